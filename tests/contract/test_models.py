"""`apply_schedule` with every layout, score and verb."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from small_models import KINDS, LAYOUTS, images, pairs, small_model, some_pairs, two_stages
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

from prunesearch.errors import ModelError, ScheduleError
from prunesearch.models import apply_schedule, remove_schedule, schedule_of, shape_of
from prunesearch.models.transformer import attend
from prunesearch.schedule import Schedule, Stage, resolve
from prunesearch.tokens import REDUCERS

MERGE = Schedule((Stage(1, keep=0.6, reduce="merge"), Stage(2, keep=0.7, reduce="merge")))

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")


def verbs(layout: str) -> list[tuple[str, str]]:
    """The pairs that a layout supports. prr pooling supports no token sizes; prr and no pooling support no masking."""
    possible = pairs(LAYOUTS[layout].get("class_token") is not False)
    if layout in KINDS:  # of other families some, which cover every score and every verb
        possible = [pair for pair in possible if pair in some_pairs() or pair[1] == "drop"]
    if layout in ("prr", "no_pool"):
        possible = [(score, verb) for score, verb in possible if score != "predictor"]
    if layout == "prr":
        possible = [(score, verb) for score, verb in possible if not REDUCERS[verb].merges]
    return possible


def learns(score: str, verb: str) -> bool:
    return score == "predictor" or verb == "pool"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_schedule_is_bit_equal(layout: str) -> None:
    model, x = small_model(layout), images()
    keys, before = list(model.state_dict()), model(x)
    assert torch.equal(apply_schedule(model, Schedule())(x), before)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_that_removes_nothing_is_bit_equal(layout: str) -> None:
    model, x = small_model(layout), images()
    before = model(x)
    idle = Schedule((Stage(1, score="random", keep=1.0), Stage(2, score="key_norm", tokens=36)))
    assert torch.equal(apply_schedule(model, idle)(x), before)


@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_as_resolved_and_removal_restores_the_model(layout: str, at: str) -> None:
    model, x = small_model(layout), images()
    keys, before = list(model.state_dict()), model(x)
    for score, verb in verbs(layout):
        schedule = two_stages(score, verb, at)
        apply_schedule(model, schedule)
        assert schedule_of(model) == schedule
        learned = [key for key in model.state_dict() if key not in keys]
        assert [key for key in model.state_dict() if key in keys] == keys
        assert all(key.startswith("token_stages.") for key in learned) and bool(learned) == learns(score, verb)
        left = resolve(schedule, shape_of(model))[-1].after
        assert model.forward_features(x).shape[1] == left + model.num_prefix_tokens
        assert not torch.equal(model(x), before)
    remove_schedule(model)
    assert type(model).__module__.startswith("timm.") and schedule_of(model) is None
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_images_result_does_not_depend_on_the_batch_around_it(layout: str) -> None:
    model, x = small_model(layout), images(4)
    for score, verb in verbs(layout):
        apply_schedule(model, two_stages(score, verb))
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(x.flip(0)).flip(0), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("score", "verb"), pairs())
def test_pickle_deepcopy_and_checkpointing(score: str, verb: str) -> None:
    model, x = small_model("registers"), images()
    apply_schedule(model, two_stages(score, verb))
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    expected.sum().backward()
    gradient = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    again = model(x)
    again.sum().backward()
    assert torch.equal(again, expected)
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), some_pairs())
def test_compile_fullgraph_and_export(score: str, verb: str, at: str) -> None:
    model, x = small_model("class"), images()
    apply_schedule(model, two_stages(score, verb, at))
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.slow
def test_inductor_compiles_what_eager_computes() -> None:
    model, x = small_model("avg"), images()
    schedule = Schedule((Stage(1, keep=0.6, reduce="squeeze"), Stage(2, keep=0.6, reduce="merge")))
    apply_schedule(model, schedule)
    with torch.no_grad():
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", ["class", "qk_norm", "gate", "registers"])
def test_our_attention_is_timms(layout: str, fused: bool) -> None:
    model = small_model(layout)
    attention, x = model.blocks[0].attn, torch.randn(2, 37, 32)
    attention.fused_attn = fused
    bias = torch.randn(2, 1, 1, 37)
    for mask in (None, bias):
        assert torch.equal(attend(attention, x, mask, shape_of(model))[0], attention(x, attn_mask=mask))


def test_proportional_attention_counts_a_merged_token_as_its_parts() -> None:
    model = small_model("class")
    attention, shape = model.blocks[0].attn, shape_of(model)
    token, others = torch.randn(1, 1, 32), torch.randn(1, 4, 32)
    copies, _ = attend(attention, torch.cat([others, token.expand(1, 3, 32)], dim=1), None, shape)
    bias = torch.tensor([1.0, 1, 1, 1, 3]).log()[None, None, None]
    merged, _ = attend(attention, torch.cat([others, token], dim=1), bias, shape)
    torch.testing.assert_close(merged[:, :4], copies[:, :4])


@pytest.mark.parametrize("layout", ["avg", "avg_no_class", "avg_with_prefix", "avgmax", "map"])
def test_pooling_counts_merged_tokens_by_their_size(layout: str) -> None:
    """Merging equal tokens must not change the result of any pooling."""
    model = small_model(layout)
    with torch.no_grad():
        if model.pos_embed is not None:
            model.pos_embed[:, model.pos_embed.shape[1] - 36 :] = 0.3  # equal patches give equal tokens
    x = images(2)[..., :1, :1].expand(-1, -1, 24, 24)
    before = model(x)
    torch.testing.assert_close(apply_schedule(model, MERGE)(x), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="sizes"):
        model.forward_head(model.forward_features(x))


def test_training_mode_takes_gradients_and_drop_path() -> None:
    model = small_model("drop_path").train()
    for score, verb in pairs():
        model.zero_grad()
        apply_schedule(model, two_stages(score, verb))(images()).sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_half_precision_and_autocast() -> None:
    model, x = small_model("layer_scale"), images()
    for score, verb in pairs():
        apply_schedule(model, two_stages(score, verb))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(model(x)).all()
        assert copy.deepcopy(model).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_another_image_size_is_resolved_anew() -> None:
    model = small_model("class", dynamic_img_size=True)
    apply_schedule(model, Schedule((Stage(1, keep=0.5),)))
    assert model.forward_features(images(1, 24)).shape[1] == 1 + 18
    assert model.forward_features(images(1, 32)).shape[1] == 1 + 32


def test_applying_twice_replaces() -> None:
    model = small_model()
    apply_schedule(model, Schedule((Stage(1, keep=0.5),)))
    second = Schedule((Stage(2, keep=0.5),))
    assert schedule_of(apply_schedule(model, second)) == second
    assert type(remove_schedule(model)) is VisionTransformer


def test_a_schedule_that_does_not_fit_changes_nothing() -> None:
    model, x = small_model(), images()
    before = model(x)
    with pytest.raises(ScheduleError, match="blocks 0 to 3"):
        apply_schedule(model, Schedule((Stage(9, keep=0.5),)))
    assert type(model) is VisionTransformer and torch.equal(model(x), before)


def test_refusals_say_what_to_do() -> None:
    model = apply_schedule(small_model(), MERGE)
    with pytest.raises(ModelError, match="attn_mask"):
        model(images(), attn_mask=torch.ones(1))
    with pytest.raises(ModelError, match="remove_schedule"):
        model.forward_intermediates(images())
    with pytest.raises(ModelError, match="prr"):
        apply_schedule(small_model("prr"), MERGE)
    with pytest.raises(ModelError, match="VisionTransformer"):
        apply_schedule(torch.nn.Linear(2, 2), MERGE)


@pytest.mark.parametrize("block", [ParallelScalingBlock, ResPostBlock])
def test_blocks_that_only_look_alike_are_refused(block: type) -> None:
    with pytest.raises(ModelError, match=block.__name__):
        apply_schedule(small_model(block_fn=block), Schedule())


def test_subclasses_are_refused() -> None:
    class MyVit(VisionTransformer):
        pass

    class MyAttention(Attention):
        pass

    with pytest.raises(ModelError, match="MyVit"):
        apply_schedule(MyVit(embed_dim=32, depth=1, num_heads=2), Schedule())
    with pytest.raises(ModelError, match="MyAttention"):
        apply_schedule(small_model(attn_layer=MyAttention), Schedule())


def test_an_attentions_tensors_are_gone_when_the_mlp_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take as much memory as the tokens, several times."""
    model, alive, seen = small_model(depth=2), [], []

    def attend_and_note(*args: Any, **given: Any) -> Any:
        x, attended = attend(*args, **given)
        alive.extend(map(weakref.ref, (attended.query_BHND, attended.key_BHND, attended.output_BHND)))
        return x, attended

    monkeypatch.setattr("prunesearch.models.transformer.attend", attend_and_note)
    apply_schedule(model, Schedule((Stage(0, keep=0.5), Stage(1, keep=0.5, reduce="merge", score="none"))))
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: seen.append([one() for one in alive]))
    with torch.no_grad():
        model(images(2))
    assert len(seen) == 2 and len(seen[1]) == 6 and not any(one is not None for several in seen for one in several)
