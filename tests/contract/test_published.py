"""Token counts and MACs of presets agree with papers and released code, on timm's shapes (no weights).

Papers count blocks, patch embedding and classifier. Our cost also includes scores and verbs; `bare` leaves these out
where the published figure does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from prunesearch.config import ModelConfig
from prunesearch.cost import MACS, estimate_cost
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import model_shape
from prunesearch.presets import load_preset, presets
from prunesearch.schedule import Schedule, Stage
from prunesearch.shape import ModelShape

NAMES = {letter: f"{family}_{size}_patch16_224" for letter, family, size in (
    ("t", "deit", "tiny"), ("s", "deit", "small"), ("b", "deit", "base"), ("l", "vit", "large"))}  # fmt: skip
NAMES["h"] = "vit_huge_patch14_224"


def shape(letter: str) -> ModelShape:
    return model_shape(ModelConfig(NAMES[letter], num_classes=1000))  # timm's ViT-H has no classifier


def bare(model: ModelShape, schedule: Schedule) -> int:
    """MACs of patch embedding, blocks and classifier alone."""
    cost = estimate_cost(model, schedule)
    tokens = zip(cost.attention_tokens, cost.mlp_tokens, strict=True)
    return model.stem_macs + model.head_macs + sum(MACS.block(model, *pair) for pair in tokens)


# --- token counts, class token included --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "after"),
    [
        ("dynamicvit-0.9", (177, 159, 143)),
        ("dynamicvit-0.8", (157, 126, 101)),
        ("dynamicvit-0.7", (138, 97, 68)),
        ("dynamicvit-0.5", (99, 50, 25)),
        ("dtps-0.7", (138, 97, 68)),
        ("dtps-0.5", (99, 50, 25)),
        ("topk-0.7", (138, 97, 68)),
        ("topk-0.5", (99, 50, 25)),
        ("evit-0.7", (139, 98, 69)),
        ("etps-0.7", (139, 98, 69)),
        ("evit-fuse-0.7", (140, 100, 72)),
        ("evit-fuse-0.5", (100, 52, 28)),
        # the third 50 is more than half of 96 patch tokens: the released code clips it to 48, so 49 stay
        ("ppt-50", (147, 97, 49)),
    ],
)
def test_counts_at_three_blocks(preset: str, after: tuple[int, ...]) -> None:
    schedule = load_preset(preset, shape("s"))
    cost = estimate_cost(shape("s"), schedule)
    assert [stage.block for stage in schedule.stages] == [3, 6, 9]
    assert (cost.tokens[3], cost.tokens[6], cost.tokens[9]) == after
    before = schedule.stages[0].at == "pre"
    assert cost.attention_tokens[3] == (after[0] if before else 197)
    assert cost.attention_tokens[4] == after[0]


@pytest.mark.parametrize(
    ("preset", "letter", "left"),
    [("tome-r8", "s", 101), ("tome-r13", "s", 41), ("tome-r16", "s", 11), ("tome-r8", "l", 7)],
)
def test_counts_of_tome(preset: str, letter: str, left: int) -> None:
    assert estimate_cost(shape(letter), load_preset(preset, shape(letter))).tokens[-1] == left


@pytest.mark.parametrize(
    ("rate", "pairs"),
    [
        (8, (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)),
        (13, (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)),
        (16, (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)),
    ],
)
def test_counts_of_decreasing_tome(rate: int, pairs: tuple[int, ...]) -> None:
    cost = estimate_cost(shape("s"), load_preset(f"tome-r{rate}-decreasing", shape("s")))
    assert [before - after for before, after in zip((197, *cost.tokens), cost.tokens, strict=False)] == list(pairs)


# --- DiffRate: counts and MACs of every released row -------------------------------------------------------------

DIFFRATE = [
    ("t-0.6", 0.655, "197,187,167,139,114,90,76,66,57,45,37,3"),
    ("t-0.7", 0.727, "197,196,192,158,133,103,88,72,64,58,49,3"),
    ("t-0.8", 0.809, "197,196,190,172,154,125,107,96,84,78,70,3"),
    ("t-0.9", 0.902, "197,196,194,188,172,147,129,115,107,103,96,3"),
    ("t-1.0", 1.004, "197,197,196,190,186,154,148,148,145,135,125,21"),
    ("s-2.3", 2.327, "197,180,156,127,109,98,80,66,52,37,31,3"),
    ("s-2.5", 2.505, "197,186,160,133,119,107,96,82,66,43,37,3"),
    ("s-2.7", 2.709, "197,188,170,147,131,119,109,96,76,54,45,3"),
    ("s-2.9", 2.905, "197,194,176,156,141,133,121,107,88,64,56,3"),
    ("s-3.1", 3.108, "197,196,186,164,150,141,133,121,103,78,68,3"),
    ("b-8.7", 8.731, "197,178,162,141,115,96,78,60,47,21,13,3"),
    ("b-10.0", 9.986, "197,186,174,156,137,117,105,90,66,31,19,3"),
    ("b-10.4", 10.434, "197,190,184,164,145,131,107,94,74,31,21,3"),
    ("b-11.5", 11.517, "197,197,192,178,158,145,127,111,94,50,35,3"),
    ("b-12.5", 12.523, "197,196,194,190,176,160,145,131,115,68,47,3"),
    ("b-mae-8.7", 8.711, "197,176,150,127,107,92,76,58,47,41,23,23"),
    ("b-mae-11.5", 11.517, "197,192,178,164,150,133,115,101,96,82,49,49"),
    ("l-mae-31.0", 31.005, "197,191,184,172,161,151,145,135,125,117,106,96,89,80,72,64,54,50,40,27,27,23,14,14"),
    ("l-mae-42.3", 42.290, "197,197,196,194,193,192,187,183,181,173,154,146,137,127,123,114,105,98,87,75,43,39,32,32"),
    ("h-mae-83.7", 83.647, "257,252,240,212,186,172,160,159,148,142,138,132,118,114,111,108,103,100,100,100,100,100,"
     "100,97,96,96,95,86,79,77,56,56"),
    ("h-mae-93.2", 92.107, "257,257,257,249,242,241,239,229,209,203,159,150,124,107,107,101,100,100,100,89,85,85,85,85,"
     "85,85,85,83,78,78,75,75"),  # labelled 93.2 in the file
    ("h-mae-103.4", 103.337, "257,256,253,247,238,211,201,195,193,185,179,171,162,154,150,144,141,138,137,135,134,133,"
     "130,127,125,125,122,114,101,90,53,53"),
    ("h-mae-124.5", 124.388, "257,254,251,244,238,223,220,203,194,186,186,186,186,184,184,184,184,183,183,182,182,182,"
     "182,181,181,181,179,167,167,133,133,133"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "gmacs", "counts"), DIFFRATE)
def test_diffrate(row: str, gmacs: float, counts: str) -> None:
    model = shape(row[0])
    schedule = load_preset(f"diffrate-{row}", model)
    assert estimate_cost(model, schedule).tokens == tuple(map(int, counts.split(",")))
    embedding_of_class_token = model.stem_macs / model.patch_tokens  # the released code counts N + 1 patches
    assert round((bare(model, schedule) + embedding_of_class_token) / 1e9, 3) == gmacs


def test_every_plain_vit_row_of_diffrate_is_a_preset() -> None:
    """28 in the released file: 5 DeiT-T, 5 DeiT-S, 5 DeiT-B, and with MAE weights 4 ViT-B, 5 ViT-L, 4 ViT-H."""
    rows = [name.removeprefix("diffrate-").rpartition("-")[0] for name in presets() if name.startswith("diffrate-")]
    assert Counter(rows) == {"t": 5, "s": 5, "b": 5, "b-mae": 4, "l-mae": 5, "h-mae": 4}


def test_diffrate_drops_then_absorbs() -> None:
    stages = [stage for stage in load_preset("diffrate-s-2.9", shape("s")).stages if stage.block == 3]
    assert [(stage.reduce, stage.tokens) for stage in stages] == [("drop", 167), ("absorb", 155)]


# --- MACs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("letter", "gmacs"), [("t", 1.25), ("s", 4.60), ("b", 17.6)])
def test_dense(letter: str, gmacs: float) -> None:
    assert f"{estimate_cost(shape(letter)).gmacs:.3g}" == f"{gmacs:.3g}"


@pytest.mark.parametrize(
    ("letter", "without", "with_predictors"), [("s", 2.88, 2.98), ("b", 11.06, 11.48), ("256", 1.33, 1.37)]
)
def test_dynamicvit(letter: str, without: float, with_predictors: float) -> None:
    """DynamicViT with width 256: 1.3289 + 0.0457 = 1.3746. Adding the rounded parts (1.33 + 0.05) would give 1.38."""
    small = shape("s")
    model = shape(letter) if letter in NAMES else replace(
        small, dim=256, heads=4, attention_dim=256, mlp_macs=8 * 256 * 256,
        stem_macs=small.stem_macs * 256 // 384, head_macs=256 * 1000,
    )  # fmt: skip
    schedule = load_preset("dynamicvit-0.7", model)
    assert round(bare(model, schedule) / 1e9, 2) == without
    assert round(estimate_cost(model, schedule).gmacs, 2) == with_predictors


@pytest.mark.parametrize(
    ("preset", "letter", "gmacs"),
    [
        ("evit-fuse-0.9", "s", 4.02),
        ("evit-fuse-0.8", "s", 3.48),
        ("evit-fuse-0.7", "s", 3.03),
        ("evit-fuse-0.6", "s", 2.64),
        ("evit-fuse-0.5", "s", 2.31),
        ("tome-r8", "s", 3.42),
        ("tome-r13", "s", 2.70),
        ("tome-r16", "s", 2.29),
        ("tome-r8", "t", 0.92),
        ("tome-r13", "t", 0.73),
        ("tome-r16", "t", 0.62),
        ("tome-r13", "b", 10.37),
        ("tome-r16", "b", 8.77),
        ("tome-r8", "l", 31.0),
        ("patchmerger-8", "t", 0.67),
        ("patchmerger-8", "s", 2.42),
        ("patchmerger-8", "b", 9.22),
        ("patchmerger-8", "l", 32.2),
    ],
)
def test_macs_by_the_papers_formula(preset: str, letter: str, gmacs: float) -> None:
    counted = bare(shape(letter), load_preset(preset, shape(letter))) / 1e9
    assert round(counted, 1 if gmacs > 30 else 2) == gmacs


# our cost, where it does not round to the published figure
DIFFERENT = {
    ("dynamicvit-0.7", "deit_small_patch16_224"): 2.98,  # published without the predictors
    ("dynamicvit-0.7", "deit_base_patch16_224"): 11.48,  # truncated to 11.4 in the paper, not rounded
    ("dynamicvit-0.8", "deit_small_patch16_224"): 3.46,  # truncated
    ("evit-0.8", "deit_small_patch16_224"): 3.44,  # the source gives the fused variant's 3.48 for both
    ("ppt-50", "deit_small_patch16_224"): 2.942,  # 2.944: their own count of the matching
    ("diffrate-s-2.9", "deit_small_patch16_224"): 2.910,  # 2.905 without the scores and similarities
    ("diffrate-b-11.5", "deit_base_patch16_224"): 11.527,
    ("diffrate-b-mae-11.5", "vit_base_patch16_224"): 11.527,
    ("diffrate-l-mae-42.3", "vit_large_patch16_224"): 42.308,
    ("diffrate-h-mae-103.4", "vit_huge_patch14_224"): 103.372,
    ("dynswin-0.7", "swin_small_patch4_window7_224"): 6.85,  # the dense model is 8.74 here and by PyTorch's counter
}


def reported() -> list[tuple[str, str, float]]:
    return [
        (name, str(row["model"]), float(row["gmacs"]))
        for name, preset in presets().items()
        for row in preset.published
        if "gmacs" in row and preset.target is None  # with a target, thresholds decide
    ]


@pytest.mark.parametrize(("preset", "model", "gmacs"), reported())
def test_every_reported_cost_of_a_fixed_schedule(preset: str, model: str, gmacs: float) -> None:
    shape_there = model_shape(ModelConfig(model))
    cost = estimate_cost(shape_there, load_preset(preset, shape_there)).gmacs
    digits = len(str(gmacs).split(".")[1])
    if round(cost, digits) != gmacs:
        assert cost == pytest.approx(gmacs, rel=0.03)
        gmacs = DIFFERENT[preset, model]
    assert round(cost, len(str(gmacs).split(".")[1])) == gmacs


@pytest.mark.parametrize("letter", ["t", "s", "b"])
@pytest.mark.parametrize("preset", [name for name, preset in presets().items() if preset.target is not None])
def test_adaptive_presets_aim_at_a_share_of_the_dense_cost(preset: str, letter: str) -> None:
    share = 0.72 if preset == "svit" else float(preset.split("-")[-1])
    assert load_preset(preset, shape(letter)).target_gmacs == pytest.approx(share * estimate_cost(shape(letter)).gmacs)


def test_asvit_target_is_close_to_its_own() -> None:
    """0.65 of 4.574 G, a count without the class token and the head."""
    assert load_preset("asvit-0.65", shape("s")).target_gmacs == pytest.approx(0.65 * 4.574, rel=0.01)


# --- other models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["deit_small_patch16_224", "deit_base_patch16_384", "vit_digits_patch1_8"])
@pytest.mark.parametrize("preset", presets())
def test_presets_fit_other_models_or_say_why_not(preset: str, model: str) -> None:
    other = model_shape(ModelConfig(model))
    searched = presets()[preset]
    if any(stage.reduce == "hold" for stage in searched.stages):
        with pytest.raises(ScheduleError, match="models with a feature map"):
            load_preset(preset, other)
        return
    if preset.startswith("diffrate") and (other.depth, other.patch_tokens) != (
        searched.depth,
        searched.patch_tokens,
    ):
        with pytest.raises(ScheduleError, match="no rule makes them fit"):
            load_preset(preset, other)
        return
    schedule = load_preset(preset, other)
    assert schedule.stages
    cost, dense = estimate_cost(other, schedule).gmacs, estimate_cost(other).gmacs
    assert cost < dense or schedule.is_adaptive


def test_asvit_thresholds_scale_with_the_tokens() -> None:
    larger = replace(shape("s"), patch_tokens=392)
    published = [stage.threshold for stage in load_preset("asvit-0.65", shape("s")).stages]
    assert published == [0.001, 0.002, 0.003]
    assert [stage.threshold for stage in load_preset("asvit-0.65", larger).stages] == [0.0005, 0.001, 0.0015]
    merge, drop = load_preset("ltmp-0.6", larger).stages[:2]
    assert (merge.reduce, merge.threshold, drop.reduce, drop.threshold) == ("merge", 0.9, "drop", 0)


def test_what_decides_does_not_change_the_blocks_cost() -> None:
    small = shape("s")
    stages = tuple(Stage(b, at="pre", score="random", tokens=t) for b, t in ((3, 137), (6, 96), (9, 67)))
    assert bare(small, Schedule(stages)) == bare(small, load_preset("dynamicvit-0.7", small))
