"""`apply_schedule` on models with a feature map (Swin, Swin-V2, ConvNeXt), where `hold` is the only verb."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from small_models import images, randomise
from timm.models._features import FeatureGetterNet
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.config import Budget, DataConfig, FinetuneConfig, MeasureConfig, ModelConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import ModelError, ScheduleError
from prunesearch.evaluate import evaluate, model_shape
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.images import image_input
from prunesearch.evaluate.schedule_loss import costs_of_images, ratio_loss, token_loss
from prunesearch.evaluate.task import Task
from prunesearch.models import (
    apply_schedule,
    input_size,
    learned_parameters,
    learned_parts,
    patches_of,
    remove_schedule,
    schedule_of,
    shape_of,
    steps_of,
    trace,
)
from prunesearch.models.map_shape import is_swin
from prunesearch.schedule import Schedule, Stage, canonical, resolve

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")

SWIN = dict(patch_size=4, embed_dim=16, depths=(1, 1, 4, 1), num_heads=(1, 2, 4, 4), num_classes=10)
CONVNEXT = dict(depths=(1, 1, 4, 1), dims=(8, 16, 32, 64), num_classes=10)
LAYOUTS: dict[str, dict[str, Any]] = {
    "swin": dict(SWIN, img_size=64, window_size=2),  # 4 x 4 map: shifted, masked windows
    "swin_padded": dict(SWIN, img_size=48, window_size=2),  # 3 x 3 map: windows need padding
    "swin_whole": dict(SWIN, img_size=64, window_size=7),  # 4 x 4 map: one window, smaller than configured
    "swin_any_size": dict(SWIN, img_size=64, window_size=2, strict_img_size=False),
    "swin_drop_path": dict(SWIN, img_size=64, window_size=2, drop_path_rate=0.3, proj_drop_rate=0.1),
    "swin_v2": dict(SWIN, img_size=64, window_size=2),
    "swin_v2_padded": dict(SWIN, img_size=48, window_size=2, strict_img_size=False),
    "convnext": CONVNEXT,
    "convnext_plain": dict(CONVNEXT, ls_init_value=None, kernel_sizes=(7, 5, 5, 3), act_layer="silu"),
    "convnext_stride_16": dict(CONVNEXT, output_stride=16),
    "convnext_stem": dict(CONVNEXT, stem_type="overlap", head_norm_first=True),
    "convnext_rms": dict(CONVNEXT, norm_layer="rmsnorm", head_hidden_size=16),
    "convnext_drop_path": dict(CONVNEXT, drop_path_rate=0.3),
}
FEW = ("swin_padded", "convnext")
NO_CHANCE = [layout for layout in LAYOUTS if not layout.endswith("drop_path")]
HOLDS = Schedule(
    tuple(Stage(block, at="pre", score="predictor", keep=keep, reduce="hold") for block, keep in ((1, 0.7), (3, 0.3)))
)
RANDOM = Schedule(tuple(replace(stage, score="random") for stage in HOLDS.stages))


def map_model(layout: str, **options: object) -> torch.nn.Module:
    """A small model with random parameters, in eval mode."""
    if layout.startswith("swin"):
        kind = SwinTransformerV2 if "_v2" in layout else SwinTransformer
        return randomise(kind(**{**LAYOUTS[layout], **options})).eval()
    model = ConvNeXt(**{**LAYOUTS[layout], **options})
    model.pretrained_cfg = {"input_size": (3, 80, 80)}  # as timm.create_model does
    return randomise(model).eval()


def held_model(layout: str, schedule: Schedule = HOLDS) -> torch.nn.Module:
    """A model with a schedule whose fast paths have as much weight as the MLPs."""
    model = apply_schedule(map_model(layout), schedule)
    randomise(model.token_stages)
    return model


def inputs(model: torch.nn.Module, count: int = 3) -> torch.Tensor:
    return images(count, input_size(model)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_schedule_is_bit_equal_also_in_training(layout: str) -> None:
    model = map_model(layout)
    x, keys = inputs(model), list(model.state_dict())

    def run(training: bool) -> torch.Tensor:
        torch.manual_seed(0)
        return model.train(training)(x)

    before = [run(False), run(True)]
    for schedule in (Schedule(), Schedule((Stage(1, at="pre", score="predictor", keep=1.0, reduce="hold"),))):
        apply_schedule(model, schedule)
        assert [torch.equal(one, run(mode)) for one, mode in zip(before, (False, True), strict=True)] == [True, True]
        assert list(model.state_dict()) == keys


@pytest.mark.parametrize("layout", FEW)
def test_what_is_learned_is_added_and_removal_restores_the_model(layout: str) -> None:
    model = map_model(layout)
    x, keys, kind = inputs(model), list(model.state_dict()), type(model)
    before = model(x)
    apply_schedule(model, HOLDS)
    assert schedule_of(model) == HOLDS
    added = [name for name in model.state_dict() if name not in keys]
    assert [name for name in model.state_dict() if name in keys] == keys
    assert all(name.startswith("token_stages.") for name in added)
    assert sum(model.state_dict()[name].numel() for name in added) == learned_parameters(HOLDS, shape_of(model))
    assert learned_parts(model) == tuple(
        f"token_stages.block{block}_pre.{part}" for block in (1, 3) for part in ("scorer", "reducer")
    )
    assert list(model.token_stages["block1_pre"].reducer) == ["block1", "block2"]
    assert list(model.token_stages["block3_pre"].reducer) == ["block3"]
    assert not torch.equal(model(x), before)
    remove_schedule(model)
    assert type(model) is kind and schedule_of(model) is None
    assert list(model.state_dict()) == keys and torch.equal(model(x), before)


@pytest.mark.parametrize("layout", NO_CHANCE)
def test_masked_and_gathered_agree_and_count_what_stays(layout: str) -> None:
    model = held_model(layout)
    x, shape = inputs(model), shape_of(model)
    with torch.no_grad():
        gathered, masked = trace(model, x, masked=False), trace(model, x, masked=True)
        features = model.forward_features(x)
    torch.testing.assert_close(masked.logits, gathered.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked.patches_BnC, gathered.patches_BnC, atol=1e-5, rtol=1e-5)
    assert torch.equal(gathered.patches_BnC, patches_of(model, features)) and gathered.present_Bn is None
    assert [count.tolist() for count in masked.counts] == [[step.kept] * 3 for step in resolve(HOLDS, shape)]
    assert gathered.counts == ()
    macs = costs_of_images(masked, steps_of(model), shape)
    assert macs.tolist() == [estimate_cost(shape, HOLDS).macs] * 3


def _before_last_stage(model: Any, x: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    swin = is_swin(model)
    stage = (model.layers if swin else model.stages)[3]
    hook = stage.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(x)
    hook.remove()
    return seen[0].flatten(1, 2) if swin else seen[0].flatten(2).transpose(1, 2)


@pytest.mark.parametrize("layout", FEW)
def test_positions_that_stay_get_the_mlp_and_the_others_the_fast_path(layout: str) -> None:
    """One stage at the last block: kept positions get the dense block's output, the others the fast path's."""
    model = map_model(layout)
    x, last = inputs(model, 2), Stage(3, at="pre", score="random", keep=0.4, reduce="hold")
    maps = [_before_last_stage(model, x)]
    apply_schedule(model, Schedule((last,)))
    randomise(model.token_stages)
    maps.append(_before_last_stage(model, x))
    same_Bn = torch.isclose(maps[0], maps[1], atol=1e-5, rtol=1e-5).all(dim=-1)
    assert same_Bn.sum(dim=1).tolist() == [resolve(Schedule((last,)), shape_of(model))[0].kept] * 2


@pytest.mark.parametrize("layout", FEW)
@pytest.mark.parametrize("schedule", [HOLDS, RANDOM], ids=["predictor", "random"])
def test_an_image_does_not_depend_on_the_batch_around_it(layout: str, schedule: Schedule) -> None:
    model = held_model(layout, schedule)
    x = inputs(model)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(x.flip(0)).flip(0), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", NO_CHANCE)
def test_macs_agree_with_the_flop_counter(layout: str) -> None:
    model = map_model(layout)
    x = inputs(model, 1)

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops() // 2

    dense = estimate_cost(shape_of(model))
    assert dense.macs == counted()
    for schedule in (RANDOM, HOLDS) if layout in FEW else (HOLDS,):
        cost = estimate_cost(shape_of(apply_schedule(model, schedule)), schedule)
        assert cost.macs == pytest.approx(counted(), rel=0.001) and cost.macs < dense.macs
    positions, (first, second) = shape_of(model).patch_tokens, (step.kept for step in resolve(HOLDS, shape_of(model)))
    assert cost.attention_tokens == (positions,) * 4 and cost.mlp_tokens == (positions, first, first, second)


@pytest.mark.parametrize("layout", ["swin", "convnext"])
def test_the_third_stage_is_counted_by_its_own_formula(layout: str) -> None:
    """The dense cost agrees by construction, so this compares the blocks alone."""
    model = map_model(layout)
    shape, stage = shape_of(model), (model.layers if layout == "swin" else model.stages)[2]
    maps: list[torch.Tensor] = []
    hook = stage.blocks[0].register_forward_pre_hook(lambda module, given: maps.append(given[0]))
    model(inputs(model, 1))
    hook.remove()
    with FlopCounterMode(display=False) as counter:
        stage.blocks(maps[0].detach())
    per_position = shape.gate_macs + shape.mlp_macs
    assert shape.depth * shape.patch_tokens * per_position == counter.get_total_flops() // 2


@pytest.mark.parametrize("layout", ["swin_drop_path", "convnext_drop_path", "convnext_plain"])
def test_gradients_reach_predictors_fast_paths_and_the_model(layout: str) -> None:
    model = held_model(layout).train()
    torch.manual_seed(0)
    outcome = trace(model, inputs(model))
    dense = torch.zeros_like(outcome.patches_BnC)
    loss = outcome.logits.square().sum() + ratio_loss(outcome, steps_of(model), shape_of(model))
    (loss + token_loss(outcome, dense)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for stage in ("block1_pre", "block3_pre"):
        assert model.get_parameter(f"token_stages.{stage}.scorer.embed.weight").grad.abs().sum() > 0
        for path in model.token_stages[stage].reducer.values():
            assert all(parameter.grad.abs().sum() > 0 for parameter in path.parameters())


def test_the_ratio_loss_compares_with_all_positions() -> None:
    model = held_model("swin").train()
    outcome = trace(model, inputs(model))
    kept = [step.step.kept for step in steps_of(model)]
    expected = [((count - k) / 16).square().mean() for count, k in zip(outcome.counts, kept, strict=True)]
    torch.testing.assert_close(ratio_loss(outcome, steps_of(model), shape_of(model)), torch.stack(expected).mean())


def test_fast_paths_start_as_the_model_does() -> None:
    paths = apply_schedule(map_model("convnext"), HOLDS).token_stages["block1_pre"].reducer.values()
    assert all(torch.equal(path.gamma, torch.full((32,), 1e-6)) for path in paths)
    assert all(path.linear.bias is not None and not path.linear.bias.any() for path in paths)
    assert len({path.linear.weight.sum().item() for path in paths}) == 2, "each block has its own"
    for layout in ("swin", "convnext_plain"):
        paths = apply_schedule(map_model(layout), HOLDS).token_stages["block1_pre"].reducer.values()
        assert all(path.gamma is None for path in paths)


@pytest.mark.parametrize("layout", ["swin", "convnext"])
def test_pickle_deepcopy_checkpointing_and_weights(layout: str) -> None:
    model = held_model(layout)
    x = inputs(model, 2)
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(apply_schedule(map_model(layout), HOLDS, weights=model.state_dict())(x), expected)
    for training in (False, True):
        gradients = []
        for checkpointed in (False, True):
            model.zero_grad()
            model.train(training).set_grad_checkpointing(checkpointed)
            torch.manual_seed(0)
            model(x).sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        torch.testing.assert_close(*gradients)


def test_compile_fullgraph_and_export() -> None:
    """Compile one of the two models and export the other, because both take seconds."""
    with torch.no_grad():
        model = held_model("swin")
        x, expected = inputs(model, 2), model(inputs(model, 2))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        model = held_model("convnext")
        x, expected = inputs(model, 2), model(inputs(model, 2))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("layout", ["swin", "convnext"])
def test_half_precision_and_autocast(layout: str) -> None:
    model = held_model(layout)
    x = inputs(model, 2)
    for training in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(model.train(training)(x)).all()
        assert copy.deepcopy(model).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        half = apply_schedule(map_model(layout).bfloat16(), HOLDS).train(training)  # the schedule's own parts stay fp32
        assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["swin_any_size", "convnext"])
def test_another_image_size_is_resolved_anew(layout: str) -> None:
    model = held_model(layout)
    for size, positions in ((64, 16), (128, 64)):
        outcome = trace(model, images(2, size), masked=True)
        shape = replace(shape_of(model), patch_tokens=positions)
        assert [count.tolist() for count in outcome.counts] == [[step.kept] * 2 for step in resolve(HOLDS, shape)]


def test_a_later_stage_chooses_among_all_positions() -> None:
    shape = shape_of(map_model("swin"))
    more = Schedule((replace(HOLDS.stages[1], block=1), replace(HOLDS.stages[0], block=3)))
    assert [(step.before, step.kept, step.after) for step in resolve(more, shape)] == [(16, 5, 5), (16, 12, 12)]
    assert [stage.tokens for stage in canonical(more, shape).stages] == [5, 12]
    assert estimate_cost(shape, more).mlp_tokens == (16, 5, 5, 12)


HOLD = dict(at="pre", score="predictor", keep=0.5, reduce="hold")


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ((Stage(1, keep=0.5),), "drop needs tokens that can go.* Possible: hold"),
        ((Stage(1, tokens=4, reduce="pool"),), "pool needs tokens that can go.* Possible: hold"),
        ((Stage(1, **{**HOLD, "at": "mid"}),), "decides on the block's input. Possible: at pre"),
        ((Stage(1, **{**HOLD, "score": "key_norm"}),), "in windows. Possible: predictor, random"),
        ((Stage(1, **{**HOLD, "score": "class_attention"}),), "in windows. Possible: predictor, random"),
        ((Stage(1, **{**HOLD, "keep": None, "threshold": 0.5}),), "hold keeps a fixed number"),
        ((Stage(4, **HOLD),), "blocks 0 to 3"),
        ((Stage(1, **{**HOLD, "score": "random"}), Stage(1, **HOLD)), "chooses among all positions already"),
    ],
)
def test_what_a_map_cannot_do_is_refused(stages: tuple[Stage, ...], says: str) -> None:
    model = map_model("swin")
    with pytest.raises(ScheduleError, match=says):
        apply_schedule(model, Schedule(stages))
    assert type(model) is SwinTransformer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_intermediates_are_as_timm_gives_them(layout: str) -> None:
    """Bit-equal with an empty schedule; with one, of the same shapes, and the final map is that of forward_features."""
    model = map_model(layout)
    x = inputs(model)
    ways = [{}, dict(indices=2, norm=True), dict(indices=[0, 2], stop_early=True), dict(indices=[1], stop_early=True)]
    dense = [model.forward_intermediates(x, intermediates_only=True, **way) for way in ways]
    apply_schedule(model, Schedule())
    for way, expected in zip(ways, dense, strict=True):
        found = model.forward_intermediates(x, intermediates_only=True, **way)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    held = held_model(layout)
    with torch.no_grad():
        for way, expected in zip(ways, dense, strict=True):
            found = held.forward_intermediates(x, intermediates_only=True, **way)
            assert [one.shape for one in found] == [one.shape for one in expected]
        final, maps = held.forward_intermediates(x)
        assert torch.equal(final, held.forward_features(x))
        assert torch.equal(maps[1], dense[0][1]) and not torch.equal(maps[2], dense[0][2])
        assert torch.equal(held(x), held.forward_head(final))  # nothing is left of the pass before
    wrapped = FeatureGetterNet(held, out_indices=(1, 2))
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(wrapped(x), maps[1:3], strict=True))


def test_models_that_only_look_alike_are_refused() -> None:
    class MyConvNeXt(ConvNeXt):
        pass

    for options, says in (
        (dict(use_grn=True), "normalises over all positions"),
        (dict(conv_mlp=True), "1x1 convolutions"),
    ):
        model = ConvNeXt(**{**CONVNEXT, **options})
        model.pretrained_cfg = {"input_size": (3, 64, 64)}
        with pytest.raises(ModelError, match=says):
            apply_schedule(model, Schedule())
    with pytest.raises(ModelError, match="MyConvNeXt"):
        apply_schedule(MyConvNeXt(**CONVNEXT), Schedule())
    with pytest.raises(ModelError, match="does not say which it is for"):
        apply_schedule(ConvNeXt(**CONVNEXT), Schedule())
    with pytest.raises(ModelError, match="2 stages"):
        apply_schedule(SwinTransformer(img_size=32, depths=(1, 1), num_heads=(1, 2), embed_dim=8), Schedule())


def test_names_of_timm_that_are_supported() -> None:
    supported = []
    for name in (
        name
        for module in ("swin_transformer", "swin_transformer_v2", "convnext")
        for name in timm.list_models(module=module)
    ):
        with torch.device("meta"):
            model = timm.create_model(name, depths=(1, 1, 1, 1))
        try:
            shape_of(model)
            supported.append(name)
        except ModelError as error:
            assert "1x1" in str(error) or "normalises over all" in str(error)
    assert len(supported) >= 28 and {
        "swinv2_tiny_window8_256",
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
        "test_convnext",
    } <= {*supported}


@pytest.mark.parametrize(
    ("config", "size", "positions"),
    [
        (ModelConfig("test_convnext"), (3, 160, 160), 100),
        (ModelConfig("test_convnext", image_size=64, options={"in_chans": 1}.items()), (1, 64, 64), 16),
        (ModelConfig("swin_tiny_patch4_window7_224", image_size=64), (3, 64, 64), 16),
    ],
)
def test_the_input_size_is_the_models_or_the_configs(config: ModelConfig, size: tuple, positions: int) -> None:
    config = replace(config, options=tuple(config.options))
    assert model_shape(config).patch_tokens == positions
    mean = (0.5,) * size[0]
    wanted = image_input(build_model(config), DataConfig(mean=mean, std=mean))
    assert wanted.size == size and (config.image_size is None or wanted.take_sized or wanted.crop_pct == 1.0)


DIGITS = DataConfig("digits", train_images=24, val_images=16, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(
    ("name", "image_size", "options"),
    [("test_convnext", 64, ()), ("swin_tiny_patch4_window7_224", 32, (("embed_dim", 24),))],
)
def test_evaluate_trains_and_measures(name: str, image_size: int, options: tuple) -> None:
    model = ModelConfig(name, image_size=image_size, num_classes=10, options=(("in_chans", 1), *options))
    depth = model_shape(model).depth
    schedule = Schedule(
        tuple(replace(stage, block=block) for stage, block in zip(HOLDS.stages, (1, depth - 1), strict=True))
    )
    task = Task(
        uid="map",
        model=model,
        schedule=schedule,
        data=DIGITS,
        finetune=FinetuneConfig(batch_size=12),
        measure=MeasureConfig(batch_size=16),
        budget=Budget(images=24),
        metrics=("top1", "gmacs", "agreement"),
        threads=1,
    )
    found = evaluate(task)
    assert found.status == "complete", found.traceback
    assert found.images == 24 and dict(found.metrics)["gmacs"] == pytest.approx(
        estimate_cost(model_shape(model), schedule).gmacs
    )
