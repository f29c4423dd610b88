"""Tokens that come back: places, values, masks, costs, graphs, for every verb and in every layout."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import LAYOUTS, images, pairs, small_model
from test_cost import counted
from test_feature_map import HOLDS, map_model
from test_feature_map import LAYOUTS as MAP_LAYOUTS
from test_masked import ADAPTIVE, THRESHOLDS
from torch import Tensor

from prunesearch.cost import estimate_cost
from prunesearch.errors import FileError, ModelError, ScheduleError
from prunesearch.export.freeze import _fixed_stages
from prunesearch.files import load_schedule, save_schedule
from prunesearch.models import apply_schedule, remove_schedule, shape_of, trace
from prunesearch.models.step import Evidence, TokenState, returned, take_step
from prunesearch.schedule import END, Schedule, Stage, canonical, resolve, without_defaults
from prunesearch.space.choices import uid_of
from prunesearch.tokens import REDUCERS

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")

VERBS = [name for name, verb in REDUCERS.items() if not verb.holds and not verb.pools]
RETURNING = [(score, verb) for score, verb in pairs() if verb in VERBS]
UNTIL: list[int | str] = [2, 3, END]


def stage(verb: str, block: int = 1, until: int | str | None = END, score: str = "key_norm", **given: object) -> Stage:
    amount = {} if {"keep", "tokens", "threshold"} & given.keys() else {"keep": 0.6}
    return Stage(block, score=score if REDUCERS[verb].ranks else "none", reduce=verb, until=until, **amount, **given)  # type: ignore[arg-type]


def nested(verb: str, score: str = "key_norm", at: str = "mid") -> Schedule:
    """A stage within another, and one after both."""
    return Schedule(
        (
            stage(verb, 0, 3, score),
            stage("drop", 1, 2, at=at, keep=0.8),
            stage(verb, 3, END, score, at="mid"),
        )
    )


FEW = ("class", "avg_with_prefix", "map", "eva_mixed", "beit_both", "relpos_swin_mlp", "naflex_rotary")
"""A layout or more of each family. The others are slow tests, where a test has one for each."""


def mostly_slow(layout: str, *more: str) -> object:
    return pytest.param(layout, *more, marks=[] if layout in FEW else pytest.mark.slow)


@pytest.mark.parametrize(
    ("layout", "verb"),
    [(layout, verb) if verb == "drop" else mostly_slow(layout, verb) for layout in LAYOUTS for verb in VERBS],
)
def test_every_token_is_back(layout: str, verb: str) -> None:
    """Shapes, an image alone, and a prefix that no step moves."""
    model, x = small_model(layout), images(4)
    if layout == "prr" and REDUCERS[verb].merges:
        pytest.skip("refused: this pooling has no room for sizes")
    dense = model.forward_features(x)
    apply_schedule(model, nested(verb))
    with torch.no_grad():
        found = trace(model, x)
        assert model.forward_features(x).shape == dense.shape
        assert found.present_Bn is None
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(alone, found.logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model.forward_features(x), dense)
    model = remove_schedule(model)
    assert torch.equal(model.forward_features(x), dense)


@pytest.mark.parametrize("verb", VERBS)
def test_at_once_every_token_is_as_it_was(verb: str) -> None:
    """Values, sizes and order; tokens that changed bring the change with them."""
    generator = torch.Generator().manual_seed(0)
    x_BNC, keys_BnD = torch.randn(2, 13, 8, generator=generator), torch.randn(2, 12, 4, generator=generator)
    scores_Bn = torch.rand(2, 12, generator=generator)
    (step,) = resolve(
        Schedule((stage(verb, score="class_attention", options={"variance": 1.0} if verb == "drop_or_merge" else {}),)),
        shape_of(small_model()),
    )
    step = replace(step, before=12, kept=7)
    state, _ = take_step(step, TokenState(x_BNC), 1, Evidence(scores_Bn, keys_BnD), ())
    assert state.tokens_BNC.shape[1] == 1 + 7 + REDUCERS[verb].extra_tokens
    back = returned(state, 1)
    torch.testing.assert_close(back.tokens_BNC, x_BNC, atol=1e-6, rtol=1e-5)
    assert back.size_Bn is None and back.away == ()
    moved = returned(state._replace(tokens_BNC=state.tokens_BNC + 1.0), 1)
    change_BN = (moved.tokens_BNC - x_BNC).mean(dim=-1)
    torch.testing.assert_close(change_BN[:, :1], torch.ones(2, 1))
    came_along = (change_BN[:, 1:] - 1).abs() < 1e-5
    assert came_along.sum(dim=1).tolist() == ([7, 7] if verb == "drop" else [12, 12])


@pytest.mark.parametrize("verb", [verb for verb in VERBS if "returns" in REDUCERS[verb].options])
def test_a_copy_is_what_the_host_is(verb: str) -> None:
    model, x = small_model(), images()
    apply_schedule(model, Schedule((stage(verb, options={"returns": "copy"}, keep=0.55),)))
    features_BnC = model.forward_features(x)[:, 1:]
    distinct = [len(torch.unique(one, dim=0)) for one in features_BnC]
    assert max(distinct) < 36, "tokens that joined one are alike"
    remove_schedule(model)
    apply_schedule(model, Schedule((stage(verb, keep=0.55),)))
    assert min(len(torch.unique(one, dim=0)) for one in model.forward_features(x)[:, 1:]) == 36


@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), [pair for pair in RETURNING if REDUCERS[pair[1]].masked is not None])
def test_masked_and_gathered_agree(score: str, verb: str, at: str) -> None:
    """A learned drop that comes back around each verb, and one inside."""
    model, x = small_model("avg"), images(4)
    stages = (
        Stage(0, score="predictor", tokens=33, until=3),
        Stage(1, at=at, score=score, keep=0.6, reduce=verb, until=2),  # type: ignore[arg-type]
        Stage(3, score=score, keep=0.6, reduce=verb),
    )
    apply_schedule(model, Schedule(stages))
    with torch.no_grad():
        gathered, masked = trace(model, x, masked=False), trace(model, x, masked=True)
        torch.testing.assert_close(masked.logits, gathered.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(x), gathered.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), ADAPTIVE)
def test_with_thresholds_an_image_does_not_depend_on_its_batch(score: str, verb: str, at: str) -> None:
    model, x = small_model("avg"), images(6)
    first = Stage(1, at=at, score=score, threshold=THRESHOLDS.get(score, 1 / 36), reduce=verb, until=3)  # type: ignore[arg-type]
    inner = Stage(2, at=at, score=score, threshold=THRESHOLDS.get(score, 1 / 36), reduce=verb, until=3)  # type: ignore[arg-type]
    apply_schedule(model, Schedule((first, inner, Stage(3, keep=0.8, score="key_norm", reduce="squeeze"))))
    with torch.no_grad():
        together, masked = trace(model, x), trace(model, x, masked=True)
        alone = [trace(model, image[None]) for image in x]
    assert together.patches_BnC.shape[1] == 29 and together.present_Bn is None
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.logits, together.logits, atol=1e-5, rtol=1e-4)
    for step, counts in enumerate(together.counts):
        assert counts.tolist() == [one.counts[step].item() for one in alone] == masked.counts[step].tolist()
    assert len(together.counts) == 3 and together.counts[2].tolist() == [29.0] * 6


@pytest.mark.parametrize("layout", ["no_pool", "eva_dinov3", "relpos_swin_mlp"])
@pytest.mark.parametrize("verb", [verb for verb in VERBS if REDUCERS[verb].takes_threshold])
def test_thresholds_within_a_count(verb: str, layout: str) -> None:
    """Also where the model returns tokens, as all images have all of them at the end."""
    model, x = small_model(layout), images(6)
    alike = 0.9 if layout == "eva_dinov3" else 0.99
    threshold = alike if verb == "merge" else 0.045
    inner = stage(verb, 1, 3, keep=None, threshold=threshold)
    apply_schedule(model, Schedule((stage("squeeze", 0, END), inner)))
    with torch.no_grad():
        together, masked = trace(model, x), trace(model, x, masked=True)
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together.logits, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.logits, alone, atol=1e-5, rtol=1e-4)
    assert len(set(together.counts[0].tolist())) > 1 and together.patches_BnC.shape[1] == 36


def test_an_idle_stage_within_another_crosses_nothing() -> None:
    idle = (stage("drop", 0, 3), stage("drop", 1, None, keep=1.0))
    assert estimate_cost(shape_of(small_model()), Schedule(idle)).mlp_tokens == (23, 23, 23, 37)


def test_decisions_get_gradients_from_tokens_that_come_back() -> None:
    """By finite differences of the forward pass with the decision as a share."""
    model, x = small_model("avg"), images()
    schedule = Schedule((Stage(1, at="pre", score="predictor", threshold=0.545, until=2),))
    apply_schedule(model, schedule).train()
    trace(model, x, masked=True).logits.square().sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if "token_stages" in name}
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients.values()), gradients.keys()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in model.parameters())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "layout", ["class", "eva_dinov3", "eva_mixed", "beit", "relpos_swin_mlp", "naflex_rotary", "map"]
)
def test_macs_agree_with_the_flop_counter(layout: str, verb: str) -> None:
    model = small_model(layout)
    cost = estimate_cost(shape_of(model), nested(verb))
    prefix, extra = model.num_prefix_tokens, REDUCERS[verb].extra_tokens
    inside = 22 + extra
    assert [tokens - prefix for tokens in cost.mlp_tokens][0::2] == [inside, inside]
    assert [tokens - prefix for tokens in cost.attention_tokens] == [36, inside, inside, 36]
    assert cost.macs == pytest.approx(counted(apply_schedule(model, nested(verb)), images(1)), rel=0.01)


@pytest.mark.parametrize("until", UNTIL)
def test_a_stage_that_removes_nothing_is_free(until: int | str) -> None:
    model, x = small_model(), images()
    dense, idle = model(x), Schedule((stage("squeeze", until=until, keep=1.0),))
    assert estimate_cost(shape_of(model), idle) == estimate_cost(shape_of(model))
    assert canonical(idle, shape_of(model)) == Schedule()
    assert torch.equal(apply_schedule(model, idle)(x), dense)


@pytest.mark.parametrize("layout", ["class", "eva_dinov3", "relpos", "naflex_rotary"])
def test_copies_pickles_compiled_and_checkpointed_models_agree(layout: str) -> None:
    model, x = small_model(layout), images()
    apply_schedule(model, nested("squeeze"))
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    torch.compiler.reset()  # graphs of tests before this one
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    gradient = _gradient(model, x)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(_gradient(model, x), gradient)


def _gradient(model: torch.nn.Module, x: Tensor) -> Tensor:
    model.train()
    model.zero_grad()
    model(x).square().sum().backward()
    model.eval()
    return model.blocks[0].mlp.fc1.weight.grad.clone()


INTERMEDIATES = [layout for layout in LAYOUTS if layout != "gate"]


@pytest.mark.parametrize("layout", [mostly_slow(layout) for layout in INTERMEDIATES])
def test_intermediates_are_as_timm_gives_them(layout: str) -> None:
    """Bit-equal with an empty schedule; with one, of the same shapes, and the tokens that are back at the end."""
    model, x = small_model(layout), images()
    ways = [
        {},
        dict(indices=2, norm=True),
        dict(indices=[0, 2], output_fmt="NLC", stop_early=True),
        dict(indices=[1], intermediates_only=True),
    ]
    ways += [dict(indices=[0, 3], return_prefix_tokens=True)] if model.num_prefix_tokens else []
    if layout == "naflex_mixed":  # there timm's stop_early stops nothing
        ways = [way for way in ways if "stop_early" not in way]
    dense = [flat(model.forward_intermediates(x, **way)) for way in ways]
    apply_schedule(model, Schedule())
    for way, expected in zip(ways, dense, strict=True):
        found = flat(model.forward_intermediates(x, **way))
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for schedule in (nested("squeeze"), nested("drop"), nested("fuse")):
        apply_schedule(model, schedule)
        for way, expected in zip(ways, dense, strict=True):
            found = flat(model.forward_intermediates(x, **way))
            assert [one.shape for one in found] == [one.shape for one in expected]
        final, (last,) = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC")
        assert torch.equal(final, model.forward_features(x))
        assert torch.equal(final[:, model.num_prefix_tokens :], last)


def flat(found: object) -> list[Tensor]:
    """All tensors in a result, in order."""
    return [found] if isinstance(found, Tensor) else [one for part in found for one in flat(part)]  # type: ignore[attr-defined]


def test_intermediates_within_a_stage_are_what_would_return_there() -> None:
    """After block 1 of a stage until the end they are those of the stage until block 2."""
    model, x = small_model("class"), images()
    apply_schedule(model, Schedule((stage("merge", 0, END),)))
    (_, inside, *_) = model.forward_intermediates(x, intermediates_only=True)
    apply_schedule(model, Schedule((stage("merge", 0, 2),)))
    assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[1], inside)


def test_intermediates_of_thresholds() -> None:
    model, x = small_model("avg"), images(5)
    apply_schedule(model, Schedule((Stage(0, score="key_norm", threshold=0.027, until=END),)))
    together = model.forward_intermediates(x, intermediates_only=True)
    alone = [model.forward_intermediates(image[None], intermediates_only=True) for image in x]
    for place, maps in enumerate(together):
        assert maps.shape == (5, 32, 6, 6)
        torch.testing.assert_close(maps, torch.cat([one[place] for one in alone]), atol=1e-5, rtol=1e-4)


def test_maps_of_a_schedule_whose_tokens_are_gone_are_refused() -> None:
    model = apply_schedule(small_model(), Schedule((Stage(1, keep=0.5),)))
    with pytest.raises(ModelError, match="until: end"):
        model.forward_intermediates(images())
    with pytest.raises(ModelError, match="output_fmt is 'NHWC'"):
        apply_schedule(model, Schedule()).forward_intermediates(images(), output_fmt="NHWC")


def test_maps_have_every_token_in_training_too() -> None:
    model = apply_schedule(small_model("avg", patch_drop_rate=0.25), Schedule((stage("drop"),))).train()
    with pytest.raises(ModelError, match="patch_drop_rate drops patch tokens at random"):
        model.forward_intermediates(images())
    assert model(images()).isfinite().all()


def test_images_of_a_naflexvit_may_name_no_patches() -> None:
    model = apply_schedule(small_model("naflex"), Schedule((stage("drop"),)))
    expected = flat(model.forward_intermediates(images()))
    found = flat(model.forward_intermediates(images(), patch_coord=None, patch_valid=None))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ["class", "eva", "beit", "naflex", "relpos", "swin", "swin_v2", "convnext"])
def test_blocks_are_pruned_before_the_schedule(layout: str) -> None:
    """Afterwards the schedule would count blocks that are gone, and could not be removed."""
    holds = layout in MAP_LAYOUTS
    model = map_model(layout) if holds else small_model(layout)
    schedule = HOLDS if holds else Schedule((stage("drop"),))
    for _ in range(2):
        apply_schedule(model, schedule)
        with pytest.raises(ModelError, match=r"takes blocks away.*remove_schedule\(model\)"):
            model.prune_intermediate_layers([1])
        remove_schedule(model)
    last = len(model.blocks) - 1 if not holds else 3
    apply_schedule(model, schedule).prune_intermediate_layers([last])  # takes no block away
    remove_schedule(model).prune_intermediate_layers([1])


def test_frozen_thresholds_and_hashes_know_until() -> None:
    shape = shape_of(small_model())
    uids = [uid_of(Schedule((stage("drop", until=until),)), shape) for until in (None, 2, 3, END)]
    assert len(set(uids)) == 4
    model = apply_schedule(
        small_model("avg"),
        Schedule((Stage(0, score="key_norm", threshold=0.027, until=2), Stage(2, score="key_norm", threshold=0.027))),
    )
    stages = _fixed_stages(model, [torch.tensor([20.0]), torch.tensor([30.0])])
    assert [(one.tokens, one.until) for one in stages] == [(20, 2), (30, None)]


@pytest.mark.parametrize(
    ("verb", "layout"),
    [
        ("drop", "class"),
        ("merge", "eva_dinov3"),
        *(
            pytest.param(verb, layout, marks=pytest.mark.slow)
            for verb in VERBS
            for layout in ("avg", "eva_mixed", "relpos_swin_mlp", "beit_both")
        ),
    ],
)
def test_schedules_export_to_onnx(verb: str, layout: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from test_onnx_graphs import RUNTIMES, assert_plain, assert_same_logits, exported

    model, x = small_model(layout), images(5)
    apply_schedule(model, nested(verb, "attention_received"))
    file = exported(model, x[:2], tmp_path)
    assert_plain(file)
    for start in RUNTIMES.values():
        assert_same_logits(model, x, start(file))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((Stage(1, keep=0.5, until=4),), "until is 4; the model has 4 blocks. Possible: a block from 2 to 3, or end"),
        ((Stage(3, keep=0.5, until=9),), "until is 9; the model has 4 blocks. Possible: end"),
        ((Stage(1, score="none", tokens=9, reduce="pool", until=2),), "pool replaces all tokens by new ones"),
        (
            (Stage(0, keep=0.5, until=2), Stage(1, keep=0.5)),
            r"its tokens go for good, but some that left at block 0 come back before block 2.*until: 2",
        ),
        ((Stage(0, keep=0.5, until=2), Stage(1, keep=0.5, until=END)), "its tokens come back later"),
        (
            (Stage(0, keep=0.5, until=2), Stage(2, at="pre", keep=0.5)),
            r"block 2 \(pre\): it reads the attention of block 1, which says nothing of the tokens that come back",
        ),
    ],
)
def test_what_cannot_come_back_is_refused(stages: tuple[Stage, ...], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        apply_schedule(small_model(), Schedule(stages))


@pytest.mark.parametrize("until", [0, 1, -1, "later", 1.5, True])
def test_an_until_that_is_no_later_block_is_refused(until: object) -> None:
    with pytest.raises(ScheduleError, match=r"until is .*possible: a block after 1, next or end"):
        Stage(1, keep=0.5, until=until)  # type: ignore[arg-type]


def test_files_hold_until(tmp_path: Path) -> None:
    schedule = Schedule((stage("drop", 0, 2), stage("merge", 2, END, options={"returns": "copy"})))
    save_schedule(schedule, tmp_path / "back.yaml")
    text = (tmp_path / "back.yaml").read_text()
    assert "until: 2" in text and "until: end" in text and "returns: copy" in text
    assert without_defaults(load_schedule(tmp_path / "back.yaml")) == schedule
    gone = Schedule((stage("merge", 2, None),))
    save_schedule(gone, tmp_path / "gone.yaml")
    assert "returns" not in (tmp_path / "gone.yaml").read_text()
    for wrong, words in (
        ("later", "a later block as a whole number, next or end; without until"),
        ("[3]", "a later block as a whole number, next or end"),
        ("0", "from 1"),
    ):
        (tmp_path / "wrong.yaml").write_text(text.replace("until: 2", f"until: {wrong}"))
        with pytest.raises(FileError, match=f"until.*possible: .*{words}"):
            load_schedule(tmp_path / "wrong.yaml")
