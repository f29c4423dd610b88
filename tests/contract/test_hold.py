"""`hold` and `until: next` in ViTs, and scores that are running means over blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import LAYOUTS, images, small_model
from test_cost import counted
from torch import Tensor

from prunesearch.cost import estimate_cost
from prunesearch.errors import ScheduleError
from prunesearch.files import load_schedule, save_schedule
from prunesearch.models import apply_schedule, remove_schedule, schedule_of, shape_of, trace
from prunesearch.models.step import Evidence, TokenState, returned, take_step
from prunesearch.presets import load_preset
from prunesearch.schedule import END, NEXT, Schedule, Stage, blocks_read, canonical, resolve, spelled_out
from prunesearch.space.choices import uid_of

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")

MEAN = {"momentum": 0.5}
WITH_CLASS = [
    name for name in LAYOUTS if small_model(name).num_prefix_tokens and shape_of(small_model(name)).has_class_token
]


def stage(block: int, reduce: str = "hold", at: str = "mid", score: str = "key_norm", **given: object) -> Stage:
    amount = {} if {"keep", "tokens", "threshold"} & given.keys() else {"keep": 0.5}
    return Stage(block, at=at, score=score, reduce=reduce, **amount, **given)  # type: ignore[arg-type]


def held(**given: object) -> Schedule:
    return Schedule((stage(0, **given), stage(2, **given)))


def as_drop(verb: str = "drop", **options: object) -> Schedule:
    return Schedule((stage(0, verb, until=2, options=options), stage(2, verb, until=END, options=options)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hold_is_drop_until_the_next_stage(layout: str) -> None:
    model, x = small_model(layout), images()
    shape = shape_of(model)
    for schedule, meant in (
        (held(), as_drop()),
        (held(options={"representative": True}), as_drop("fuse", normalised=True)),
    ):
        assert spelled_out(schedule, shape) == meant
        assert canonical(schedule, shape) == canonical(meant, shape)
        assert uid_of(schedule, shape) == uid_of(meant, shape)
        assert estimate_cost(shape, schedule) == estimate_cost(shape, meant)
        with torch.no_grad():
            found = apply_schedule(model, schedule)(x)
            assert schedule_of(model) == schedule
            assert torch.equal(found, apply_schedule(model, meant)(x))
        remove_schedule(model)


def test_the_next_stage_is_in_a_later_block_and_removes_something() -> None:
    shape = shape_of(small_model())
    nested = stage(1, "drop", at="mid", until=2)
    stages = (stage(1, "drop", at="pre", until=NEXT), nested, stage(2, "drop", keep=1.0), stage(3, "drop"))
    assert [step.until for step in resolve(Schedule(stages), shape)] == [3, 2, None, None]
    assert [step.until for step in resolve(Schedule(stages[:2]), shape)] == [4, 2]
    assert resolve(Schedule((stage(1, until=3), stage(2, "drop", until=3))), shape)[0].until == 3
    assert not Schedule((stage(1),)).stages[0].until


def test_a_representative_takes_its_change_to_those_it_stands_for() -> None:
    """Evo-ViT for LeViT: the mean of those that wait, weighted by shares of their scores; what the blocks add to it is
    added to each of them."""
    generator = torch.Generator().manual_seed(0)
    x_BNC, scores_Bn = torch.randn(2, 37, 32, generator=generator), torch.rand(2, 36, generator=generator)
    (step,) = resolve(Schedule((stage(1, options={"representative": True}),)), shape_of(small_model()))
    state, _ = take_step(step, TokenState(x_BNC), 1, Evidence(scores_Bn), ())
    waiting_Bn = scores_Bn < scores_Bn.sort(dim=1, descending=True).values[:, 17:18]
    share_Bn = scores_Bn * waiting_Bn / (scores_Bn * waiting_Bn).sum(dim=1, keepdim=True)
    mean_BC = (share_Bn[..., None] * x_BNC[:, 1:]).sum(dim=1)
    torch.testing.assert_close(state.tokens_BNC[:, -1], mean_BC)
    added_BNC = torch.randn(state.tokens_BNC.shape, generator=generator)
    back_BNC = returned(state._replace(tokens_BNC=state.tokens_BNC + added_BNC), 1).tokens_BNC
    for image in range(2):
        waits = waiting_Bn[image]
        expected = x_BNC[image, 1:][waits] + added_BNC[image, -1]
        torch.testing.assert_close(back_BNC[image, 1:][waits], expected, atol=1e-5, rtol=1e-5)


def test_shares_of_scores_that_are_all_zero() -> None:
    (step,) = resolve(Schedule((stage(1, options={"representative": True}),)), shape_of(small_model()))
    state, _ = take_step(step, TokenState(torch.ones(1, 37, 32)), 1, Evidence(torch.zeros(1, 36)), ())
    assert torch.isfinite(state.tokens_BNC).all()


def test_evo_vit_is_the_papers() -> None:
    """Stage-wise Evo-ViT, written down from its formulas: blocks 4 to 7 and 8 to 11 run on the class token and half of
    the patch tokens, chosen among all by a running mean of class attention; the others stay as they are."""
    model, x = small_model(depth=12), images()
    schedule = load_preset("evo-vit-0.5", shape_of(model))
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(x))
        mean_Bn = chosen = None
        for index, block in enumerate(model.blocks):
            if index in (4, 8):
                chosen = 1 + mean_Bn.sort(dim=1, descending=True, stable=True).indices[:, :18].sort(dim=1).values
                chosen = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], dim=1)
            rows = slice(None) if chosen is None else chosen
            for image, one in enumerate(tokens):
                taken = one[None] if chosen is None else one[rows[image]][None]
                seen = class_row(block.attn, block.norm1(taken))[0, 1:]
                tokens[image, slice(None) if chosen is None else rows[image]] = block(taken)[0]
                if index < 4:
                    mean_Bn = torch.zeros(len(x), 36) if mean_Bn is None else mean_Bn
                    mean_Bn[image] = seen
                else:
                    where = rows[image][1:] - 1
                    mean_Bn[image, where] = 0.5 * mean_Bn[image, where] + 0.5 * seen
        expected = model.forward_head(model.norm(tokens))
        apply_schedule(model, schedule)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
        assert model.forward_features(x).shape == (3, 37, 32)


def class_row(attention: torch.nn.Module, x_BNC: Tensor) -> Tensor:
    """Attention of the class token, mean over heads, (B, N)."""
    query, key, _ = attention.qkv(x_BNC).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (query[:, :, :1] @ key.transpose(-2, -1) * attention.scale).softmax(dim=-1).mean(dim=1)[:, 0]


def test_the_mean_begins_where_its_first_stage_reads() -> None:
    shape = shape_of(small_model(depth=12))
    mean = dict(score="class_attention", options=MEAN, at="pre")
    steps = resolve(
        Schedule((stage(4, **mean), stage(6, "drop", at="mid", until=8), stage(8, **mean, until=END))), shape
    )
    assert blocks_read(steps) == [(3,), (6,), (4, 5, 6, 7)]
    pooled = (stage(2, **mean), Stage(5, score="none", tokens=9, reduce="pool"), stage(8, "drop", **mean))
    assert blocks_read(resolve(Schedule(pooled), shape)) == [(1,), (), (7,)]


def means(verb: str = "drop", until: int | str | None = END, at: str = "pre") -> Schedule:
    mean = dict(score="class_attention", options=MEAN)
    return Schedule(
        (
            stage(1, "drop", at, until=2, **mean),
            stage(2, verb, at, until=until, **mean),
            stage(3, verb, at="mid", until=until, **mean),
        )
    )


WAYS = [
    ("drop", "mid"),
    ("fuse", "pre"),
    *(
        pytest.param(verb, at, marks=pytest.mark.slow)
        for verb in ("drop", "fuse", "squeeze", "absorb")
        for at in ("mid", "pre")
        if (verb, at) not in (("drop", "mid"), ("fuse", "pre"))
    ),
]


@pytest.mark.parametrize(("verb", "at"), WAYS)
@pytest.mark.parametrize("layout", WITH_CLASS)
def test_means_in_every_layout(layout: str, verb: str, at: str) -> None:
    """An image alone, and the MACs of the rows that are read."""
    if layout == "prr" and verb == "absorb":
        pytest.skip("refused: this pooling has no room for sizes")
    model, x = small_model(layout), images()
    schedule = means(verb, at=at)
    cost = estimate_cost(shape_of(model), schedule)
    apply_schedule(model, schedule)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-4)
    assert cost.macs == pytest.approx(counted(model, images(1)), rel=0.01)


@pytest.mark.parametrize("verb", ["drop", "fuse", "squeeze", "absorb"])
@pytest.mark.parametrize("until", [None, END])
def test_masked_means_are_the_gathered_ones(verb: str, until: str | None) -> None:
    model, x = small_model("avg"), images(4)
    mean = dict(score="class_attention", options=MEAN)
    stages = (
        Stage(0, score="predictor", tokens=33, until=3),
        stage(1, "drop", "pre", until=2, **mean),
        stage(2, "drop", "pre", until=3, **mean),
        stage(3, verb, until=until, **mean),
    )
    apply_schedule(model, Schedule(stages))
    with torch.no_grad():
        gathered, masked = trace(model, x, masked=False), trace(model, x, masked=True)
        torch.testing.assert_close(masked.logits, gathered.logits, atol=1e-5, rtol=1e-5)


def test_means_with_thresholds_do_not_depend_on_the_batch() -> None:
    model, x = small_model("avg"), images(6)
    mean = dict(score="class_attention", options=MEAN)
    stages = (
        stage(1, "drop", "pre", threshold=1 / 36, until=NEXT, **mean),
        stage(2, "drop", "pre", threshold=1 / 36, until=NEXT, **mean),
        stage(3, "squeeze", threshold=1 / 36, **mean),
    )
    apply_schedule(model, Schedule(stages))
    with torch.no_grad():
        together, masked = trace(model, x), trace(model, x, masked=True)
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together.logits, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.logits, together.logits, atol=1e-5, rtol=1e-4)
    assert len(set(together.counts[2].tolist())) > 1


def test_learned_thresholds_until_the_next_stage_are_read_back() -> None:
    model = small_model("avg")
    apply_schedule(model, Schedule((stage(0, "drop", threshold=0.02, until=NEXT), stage(2, "drop", threshold=0.03))))
    with torch.no_grad():
        model.token_stages["block0_mid"].threshold.fill_(0.5)
    assert [one.threshold for one in schedule_of(model).stages] == [0.5, 0.03]
    assert schedule_of(model).stages[0].until == NEXT


def test_what_a_mean_does_not_know_is_refused() -> None:
    mean = dict(score="class_attention", at="pre", options=MEAN)
    for first in (dict(score="class_attention", at="pre"), dict(score="key_norm")):
        with pytest.raises(
            ScheduleError, match="class_attention with the option momentum in this stage and in the one"
        ):
            apply_schedule(small_model(), Schedule((stage(1, **first), stage(2, **mean))))
    with pytest.raises(ScheduleError, match="says nothing of the tokens that come back"):  # the keys are not known
        apply_schedule(small_model(), Schedule((stage(1, **mean), stage(2, "drop_or_merge", **mean))))
    with pytest.raises(ScheduleError, match=r"option momentum is 1\.0; possible: from 0\.0 to 0\.99"):
        apply_schedule(small_model(), Schedule((stage(1, score="class_attention", options={"momentum": 1.0}),)))


def test_a_mean_without_memory_is_the_score_itself() -> None:
    model, x = small_model(), images()
    plain, mean = (Schedule((stage(1, "drop", score="class_attention", options=options),)) for options in ({}, MEAN))
    assert torch.equal(apply_schedule(model, plain)(x), apply_schedule(remove_schedule(model), mean)(x))


@pytest.mark.parametrize(
    "layout", ["class", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eva_dinov3", "relpos", "naflex"))]
)
def test_means_compile_and_export(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from test_onnx_graphs import RUNTIMES, assert_plain, assert_same_logits, exported

    model, x = small_model(layout), images(5)
    apply_schedule(model, means("fuse"))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    file = exported(model, x[:2], tmp_path)
    assert_plain(file)
    for start in RUNTIMES.values():
        assert_same_logits(model, x, start(file))


@pytest.mark.parametrize("name", ["evo-vit-0.5", "svit", "tosa"])
@pytest.mark.parametrize("layout", ["class", "eva_rotary", "relpos"])
def test_presets_bring_every_token_back(name: str, layout: str) -> None:
    model, x = small_model(layout, depth=12), images()
    dense = model.forward_features(x)
    apply_schedule(model, load_preset(name, shape_of(model)))
    with torch.no_grad():
        assert model.forward_features(x).shape == dense.shape
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-4)
    model.train()(x).square().sum().backward()


def test_files_hold_next_and_hold(tmp_path: Path) -> None:
    schedule = Schedule((stage(0, options={"representative": True}), stage(2, "drop", until=NEXT)))
    save_schedule(schedule, tmp_path / "held.yaml")
    text = (tmp_path / "held.yaml").read_text()
    assert "until: next" in text and "representative: true" in text
    assert spelled_out(load_schedule(tmp_path / "held.yaml"), shape_of(small_model())) == spelled_out(
        schedule, shape_of(small_model())
    )


# --- found by trying to break it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["drop", "hold", "squeeze", "fuse"])
def test_thresholds_within_a_stage_that_is_not_over(outer: str) -> None:
    """Also where the batch was split into groups when the inner tokens come back."""
    model, x = small_model("avg"), images(6)
    until = None if outer == "hold" else END
    apply_schedule(
        model, Schedule((stage(0, outer, keep=0.9, until=until or END), stage(1, "drop", threshold=0.03, until=3)))
    )
    with torch.no_grad():
        together, masked = trace(model, x, masked=False), trace(model, x, masked=True)
        alone = torch.cat([model(image[None]) for image in x])
    assert len(set(together.counts[0].tolist())) > 1
    torch.testing.assert_close(together.logits, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.logits, alone, atol=1e-5, rtol=1e-4)


def test_means_of_a_verb_that_reads_keys_pass_blocks_without_a_stage() -> None:
    model, x = small_model(), images()
    mean = dict(score="class_attention", options=MEAN)
    apply_schedule(model, Schedule((stage(0, "drop", **mean), stage(3, "drop_or_merge", **mean))))
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-4)


def test_a_mean_that_began_anew_is_not_known_at_once() -> None:
    """Tokens came back without one, so that it holds only what was seen since."""
    mean = dict(score="class_attention", options=MEAN)
    stages = (
        stage(0, "drop", until=3),
        stage(1, "drop", until=2, **mean),
        stage(3, "drop", at="pre", score="random", until=4),
        stage(4, "drop", at="pre", until=END, **mean),
    )
    with pytest.raises(ScheduleError, match="says nothing of the tokens that come back before block 4"):
        resolve(Schedule(stages), shape_of(small_model(depth=6)))
    later = (
        *stages[:2],
        stage(4, "drop", at="pre", score="random", until=5),
        stage(5, "drop", at="pre", until=END, **mean),
    )
    model, x = small_model(depth=6), images()
    apply_schedule(model, Schedule(later))
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(one[None]) for one in x]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("verb", ["drop", "fuse", "squeeze", "absorb", "drop_or_merge"])
def test_a_mean_is_what_it_was_when_tokens_return_at_once(verb: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BNC, keys_BnD = torch.randn(2, 37, 32, generator=generator), torch.randn(2, 36, 8, generator=generator)
    mean_Bn = torch.rand(2, 36, generator=generator)
    (step,) = resolve(Schedule((stage(1, verb, keep=0.6, until=END),)), shape_of(small_model()))
    state, _ = take_step(step, TokenState(x_BNC, memory_Bn=mean_Bn), 1, Evidence(mean_Bn, keys_BnD), ())
    assert torch.equal(returned(state, 1).memory_Bn, mean_Bn)


def test_a_predictor_whose_tokens_come_back_before_a_stage_for_good_can_be_trained() -> None:
    """Then tokens are not in their slots at the end, and are not compared with the dense model's."""
    from prunesearch.config import FinetuneConfig
    from prunesearch.evaluate.schedule_loss import distills_tokens

    learned = stage(1, "drop", at="pre", score="predictor", until=2)
    model = small_model()
    for rest, compared in (((), True), ((stage(2, "drop"),), False), ((stage(2, "drop", until=END),), True)):
        apply_schedule(model, Schedule((learned, *rest)))
        assert distills_tokens(model, FinetuneConfig()) == compared
        remove_schedule(model)
    apply_schedule(model, Schedule((stage(0, "drop"), stage(1, "drop", at="pre", score="predictor"))))
    assert not distills_tokens(model, FinetuneConfig())


def test_values_of_another_precision_can_be_put_back() -> None:
    from prunesearch.tokens.select import put

    values, places = torch.zeros(1, 3, 2), torch.tensor([[1]])
    for first, second in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        found = put(values.to(first), places, torch.ones(1, 1, 2, dtype=second))
        assert found.dtype == torch.float32 and found.tolist() == [[[0, 0], [1, 1], [0, 0]]]
