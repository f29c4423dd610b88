"""Models with a schedule on images of another size, and on unusual inputs.

Two results are right. Either the logits equal those of a model that was built for the other size, with the same weights
and the schedule applied there; or a ScheduleError says why the size is impossible.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from small_models import images, pairs, small_model, some_pairs, two_stages
from test_feature_map import HOLDS, LAYOUTS, inputs, map_model
from test_masked import adaptive, learned_first
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.cost import estimate_cost
from prunesearch.errors import ModelError, ScheduleError
from prunesearch.models import PARTS, apply_schedule, shape_of, steps_of, trace
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")

SIZES = [(8, 8), (16, 16), (40, 40), (16, 40), (40, 16)]  # 4, 16, 100, 40 and 40 patches; the model is built for 36
AMOUNTS = [dict(keep=0.6), dict(keep=1.0), dict(tokens=20), dict(tokens=8), dict(tokens=36)]


@functools.cache
def built(size: tuple[int, int]) -> nn.Module:
    """A ViT built for images of a size, with the weights of the one for 24 x 24; its position embedding is resized."""
    model = small_model("avg", dynamic_img_size=True)
    model.set_input_size(img_size=size)
    return model.eval()


def with_parts_of(model: nn.Module, schedule: Schedule, other: nn.Module) -> nn.Module:
    """Apply a schedule to a model and load the learned parts of another model."""
    apply_schedule(model, schedule)
    if hasattr(model, PARTS):
        getattr(model, PARTS).load_state_dict(
            {
                name: value
                for name, value in getattr(other, PARTS).state_dict().items()
                if name in model.token_stages.state_dict()
            }
        )
    return model


def rectangles(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def agree(schedule: Schedule) -> set[str]:
    """Compare on every size; returns which of the two right results occurred."""
    model, answers = copy.deepcopy(built((24, 24))), set()
    try:
        apply_schedule(model, schedule)
    except ScheduleError:
        return {"refused"}
    for size in SIZES:
        x = rectangles(size)
        try:
            with torch.no_grad():
                found = trace(model, x), model(x), trace(model, x, masked=True).logits
        except ScheduleError as error:
            assert f"images of {size[0] * size[1] // 16} patch tokens (the model is built for 36): stage" in str(error)
            answers.add("refused")
            continue
        with torch.no_grad():
            expected = trace(with_parts_of(copy.deepcopy(built(size)), schedule, model), x)
        torch.testing.assert_close(found[0].logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[2], expected.logits, atol=1e-4, rtol=1e-4)
        assert found[0].patches_BnC.shape == expected.patches_BnC.shape
        answers.add("as built")
    return answers


@pytest.mark.parametrize("amount", AMOUNTS, ids=lambda amount: "-".join(f"{k}{v}" for k, v in amount.items()))
@pytest.mark.parametrize(("score", "verb"), some_pairs())
def test_counts_at_another_size(score: str, verb: str, amount: dict) -> None:
    first = Stage(1, score=score, reduce=verb, **amount)
    later = () if verb == "pool" else (Stage(2, at="pre", score="random", keep=0.7),)
    answers = agree(Schedule((first, *later)))
    assert answers, "every size was tried"
    if "keep" in amount and REDUCERS[verb].part is None:
        assert answers == {"as built"}, "a fraction fits any size"


@pytest.mark.parametrize("verb", [verb for verb, entry in REDUCERS.items() if entry.takes_threshold])
def test_thresholds_at_another_size(verb: str) -> None:
    score = "none" if verb == "merge" else "key_norm"
    for threshold in (0.01, 0.03, 0.9):
        stages = (Stage(1, score=score, threshold=threshold, reduce=verb), Stage(3, score="predictor", keep=0.5))
        assert agree(Schedule(stages)) == {"as built"}


@pytest.mark.parametrize(
    ("stage", "size", "says"),
    [
        (Stage(1, keep=0.25, reduce="pool"), 40, "pool to 25 of 100 needs learned parts of other shapes than it has"),
        (Stage(1, tokens=9, reduce="pool"), 8, "only 4 patch tokens are present"),
        (Stage(1, tokens=4, reduce="pool"), 8, "pool to 4 of 36 needs more patch tokens than these images have"),
        (Stage(1, tokens=36, reduce="pool"), 40, "needs learned parts, which it has not, as it removes nothing at"),
        (Stage(1, score="predictor", tokens=36), 40, "needs learned parts, which it has not"),
        (Stage(1, tokens=20), 16, "tokens is 20, but only 16 patch tokens are present"),
        (Stage(1, tokens=20, reduce="merge"), 40, "merge cannot go from 100 to 20"),
    ],
)
def test_what_another_size_cannot_have_is_a_sentence(stage: Stage, size: int, says: str) -> None:
    model = apply_schedule(copy.deepcopy(built((24, 24))), Schedule((stage,)))
    with pytest.raises(ScheduleError, match=says):
        model(rectangles((size, size)))
    assert torch.isfinite(model(rectangles((24, 24)))).all()


@pytest.mark.parametrize(
    ("layout", "size", "stage"),
    [
        ("eva_dinov3", (40, 40), Stage(1, tokens=36, reduce="fuse")),
        ("eva_dinov3", (40, 40), Stage(1, tokens=36, reduce="squeeze", options=(("position", "mean"),))),
        ("map", (24, 32), Stage(1, tokens=36, reduce="merge")),
        ("eva_map", (24, 32), Stage(1, tokens=36, reduce="merge")),
    ],
)
def test_what_only_another_size_does_is_done_there(layout: str, size: tuple[int, int], stage: Stage) -> None:
    """The stage removes nothing at the model's own size, so the facts of its plan are other ones."""
    model, fresh = (small_model(layout, dynamic_img_size=True) for _ in range(2))
    fresh.set_input_size(img_size=size)
    found, expected = (apply_schedule(one.eval(), Schedule((stage,)))(rectangles(size)) for one in (model, fresh))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_only_another_size_cannot_do_is_refused() -> None:
    schedule, x = Schedule((Stage(1, tokens=36, reduce="merge"),)), rectangles((24, 32))
    with pytest.raises(ModelError, match="global_pool='prr' attends over the final tokens"):
        apply_schedule(small_model("prr", dynamic_img_size=True), schedule)
    model = apply_schedule(small_model("avg", dynamic_img_size=True), schedule)
    with pytest.raises(ModelError, match="forward_head: this model pools over merged"):
        model.forward_head(model.forward_features(x))


def test_images_are_padded_to_whole_patches() -> None:
    model = small_model("class", dynamic_img_size=True, dynamic_img_pad=True)
    padded = nn.functional.pad(rectangles((22, 30)), (0, 2, 0, 2))
    apply_schedule(model, two_stages("class_attention", "fuse"))
    assert torch.equal(model(rectangles((22, 30))), model(padded))


def test_the_models_own_size_may_need_padding() -> None:
    model = small_model("class", img_size=26, dynamic_img_size=True, dynamic_img_pad=True)
    schedule = two_stages("class_attention", "fuse")
    shape, x = shape_of(model), rectangles((26, 26))
    assert shape.patch_tokens == 49
    for one in (Schedule(), schedule):
        with FlopCounterMode(display=False) as counter:
            apply_schedule(model, one)(x)
        assert estimate_cost(shape, one).macs * len(x) == pytest.approx(counter.get_total_flops() // 2, rel=0.001)


def test_a_size_that_is_set_after_the_schedule_is_the_models_own() -> None:
    schedule = Schedule((Stage(1, keep=0.5), Stage(2, score="predictor", keep=0.5)))
    model = apply_schedule(copy.deepcopy(built((24, 24))), schedule)
    model.set_input_size(img_size=(40, 40))
    expected = with_parts_of(copy.deepcopy(built((40, 40))), schedule, model)
    assert torch.equal(model(rectangles((40, 40))), expected(rectangles((40, 40))))
    assert shape_of(model) == shape_of(expected) and steps_of(model) == steps_of(expected)


def test_swin_after_set_input_size() -> None:
    model, fresh = apply_schedule(map_model("swin_any_size"), HOLDS), map_model("swin_any_size")
    for changed in (model, fresh):
        changed.set_input_size(img_size=(96, 128), window_size=2)
    expected, x = with_parts_of(fresh, HOLDS, model), rectangles((96, 128))
    assert torch.equal(model(x), expected(x))
    assert shape_of(model) == shape_of(expected) and shape_of(model).patch_tokens == 48
    assert steps_of(model) == steps_of(expected)


@pytest.mark.parametrize(("layout", "size"), [("swin_any_size", (128, 64)), ("convnext", (96, 160))])
def test_maps_of_another_size(layout: str, size: tuple[int, int]) -> None:
    x = rectangles(size)
    for stages, fits in ((HOLDS.stages, True), ((replace(HOLDS.stages[0], keep=None, tokens=10),), True)):
        schedule = Schedule(stages)
        model, fresh = apply_schedule(map_model(layout), schedule), map_model(layout)
        if isinstance(fresh, SwinTransformer):
            fresh.set_input_size(img_size=size, window_size=2)
        else:
            fresh.pretrained_cfg = {"input_size": (3, *size)}
        expected = with_parts_of(fresh, schedule, model)
        assert torch.equal(model(x), expected(x)) and fits
    too_many = Schedule((replace(HOLDS.stages[0], keep=None, tokens=16 if layout.startswith("swin") else 25),))
    with pytest.raises(ScheduleError, match="needs learned parts, which it has not"):
        apply_schedule(map_model(layout), too_many)(x)


CASES = {
    **{f"{score}-{verb}-{at}": two_stages(score, verb, at) for score, verb in pairs() for at in ("pre", "mid")},
    "masked": learned_first("none", "merge", "mid"),
    "threshold": adaptive("class_attention", "fuse"),
    "merge_threshold": adaptive("none", "merge"),
    "dense": Schedule(),
}


@pytest.mark.filterwarnings(r"ignore:var\(\)")  # drop_or_merge takes a variance over the scores of no image
@pytest.mark.parametrize("layout", ["class", "avg", "map", "max"])
def test_no_images_give_no_logits(layout: str) -> None:
    model = small_model(layout)
    for schedule in CASES.values():
        if layout in ("map", "max") and any("class" in s.score or "value" in s.score for s in schedule.stages):
            continue
        apply_schedule(model, schedule)
        for training in (False, True):
            for masked in (False, True):
                outcome = trace(model.train(training), torch.zeros(0, 3, 24, 24), masked=masked)
                assert outcome.logits.shape == (0, 10) and all(count.shape == (0,) for count in outcome.counts)
            assert model(torch.zeros(0, 3, 24, 24)).shape == (0, 10)


def test_no_images_give_no_logits_with_a_map() -> None:
    """For ConvNeXt only. timm's Swin fails on an empty batch even without a schedule."""
    model = apply_schedule(map_model("convnext"), HOLDS)
    for training in (False, True):
        assert model.train(training)(inputs(model, 0)).shape == (0, LAYOUTS["convnext"]["num_classes"])
    with pytest.raises(RuntimeError, match="cannot reshape"):
        map_model("swin")(images(0, 64))


@pytest.mark.parametrize("case", CASES)
def test_layout_in_memory_and_gradients_of_the_images(case: str) -> None:
    model = apply_schedule(small_model("registers"), CASES[case])
    x = images(2)
    expected = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-5)
    flipped = x.flip(0).flip(0)[:, :, ::1]
    torch.testing.assert_close(model(flipped), expected)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    given = x.clone().requires_grad_()
    model(given).sum().backward()
    assert given.grad is not None and torch.isfinite(given.grad).all() and given.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", ["swin", "convnext"])
def test_maps_in_another_layout_in_memory(layout: str) -> None:
    model = apply_schedule(map_model(layout), HOLDS)
    x = inputs(model, 2)
    expected = model(x)
    found = copy.deepcopy(model).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    given = x.clone().requires_grad_()
    model(given).sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0
