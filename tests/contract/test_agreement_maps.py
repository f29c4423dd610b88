"""Dynamic spatial sparsification agrees with the papers' formula (float64); distilled tokens are normalised."""

from __future__ import annotations

import pytest
import timm
import torch
from small_models import LAYOUTS as VIT_LAYOUTS
from small_models import images, small_model
from test_feature_map import LAYOUTS, NO_CHANCE, held_model, inputs, map_model
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor
from torch.nn import functional as F

from prunesearch.models import apply_schedule, map_shape, patches_of, shape_of, steps_of, trace
from prunesearch.models.map_shape import STAGE, stages_of
from prunesearch.schedule import Schedule, Stage

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")


def norm_of(layer: torch.nn.Module, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, eps)


def keep_probability(predictor: torch.nn.Module, x: Tensor, eps: float) -> Tensor:
    """DynamicViT, eq. 1-5, with the mean over all positions: log-probability of staying."""
    z = F.gelu(F.linear(norm_of(predictor.norm, x, eps), predictor.embed.weight, predictor.embed.bias))
    local, shared = z.chunk(2, dim=-1)
    z = torch.cat([local, shared.mean(dim=1, keepdim=True).expand_as(shared)], dim=-1)
    for index in (0, 2, 4):
        layer = predictor.decide[index]
        z = F.linear(z if index == 0 else F.gelu(z), layer.weight, layer.bias)
    return z.log_softmax(dim=-1)[..., 0]


def recomputed(model: torch.nn.Module, x: Tensor, eps: float) -> Tensor:
    """The final map: all positions are mixed; kept ones go through the MLP, the others through the fast path."""
    is_swin, is_v2 = map_shape.is_swin(model), isinstance(model, SwinTransformerV2)
    x = model.patch_embed(x) if is_swin else model.stem(x)
    stages, parts, paths = stages_of(model), model.token_stages, {}
    for part in parts.values():
        paths |= dict(part.reducer.items())
    for index, stage in enumerate(stages):
        if index != STAGE:
            x = stage(x)
            continue
        x, kept, steps = stage.downsample(x), None, {step.stage.block: step for step in steps_of(model)}
        for number, block in enumerate(stage.blocks):
            shortcut = x
            if number in steps:
                tokens = x.flatten(1, 2) if is_swin else x.flatten(2).transpose(1, 2)
                scores = keep_probability(parts[steps[number].key].scorer, tokens, eps)
                kept = torch.zeros_like(scores).scatter(1, scores.topk(steps[number].step.kept).indices, 1.0) > 0
            if kept is None:
                x = block(x)
                continue
            path = paths[f"block{number}"]
            if is_v2:
                x = shortcut = x + block.norm1(block._attn(x))
                slow = block.norm2(block.mlp(x))
            elif is_swin:
                x = shortcut = x + block._attn(block.norm1(x))
                slow = block.mlp(block.norm2(x))
            else:
                x = block.conv_dw(x).permute(0, 2, 3, 1)
                slow = block.mlp(block.norm(x))
                slow = slow if block.gamma is None else slow * block.gamma
            fast = F.linear(norm_of(path.norm, x, eps), path.linear.weight, path.linear.bias)
            fast = fast if path.gamma is None else fast * path.gamma
            added = torch.where(kept.view(*x.shape[:3], 1), slow, fast)
            x = shortcut + (added if is_swin else added.permute(0, 3, 1, 2))
    return model.norm(x) if is_swin else model.norm_pre(x)


@pytest.mark.parametrize("layout", NO_CHANCE)
@torch.no_grad()
def test_hold_is_the_papers(layout: str) -> None:
    model = held_model(layout).double()
    x = inputs(model).double()
    expected = recomputed(model, x, eps=1e-5 if layout.startswith("swin") else 1e-6)
    torch.testing.assert_close(model.forward_features(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_learned_parts_have_the_epsilon_of_the_models_own_norms(layout: str) -> None:
    model = held_model(layout)
    block = stages_of(model)[STAGE].blocks[0]
    own = (block.norm2 if layout.startswith("swin") else block.norm).eps
    learned = {part.eps for part in model.token_stages.modules() if isinstance(part, torch.nn.LayerNorm)}
    assert learned == {own} == {shape_of(map_model(layout)).norm_eps}


def test_predictors_of_vits_keep_the_released_epsilon() -> None:
    model = apply_schedule(small_model(), Schedule((Stage(1, score="predictor", keep=0.5),)))
    assert model.blocks[0].norm1.eps == 1e-6  # the eps of DeiT; the released predictor has PyTorch's default
    assert {m.eps for m in model.token_stages.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


# --- token distillation: final tokens are compared after the model's last norm -------------------------------------


def is_normalised(tokens: Tensor, norm: torch.nn.Module) -> bool:
    """Whether tokens have mean 0 and variance 1 before the scale and shift of the norm."""
    plain = (tokens - norm.bias) / norm.weight if getattr(norm, "bias", None) is not None else tokens / norm.weight
    square = plain.square().mean(dim=-1)
    return torch.allclose(square, torch.ones_like(square), atol=1e-2)


def last_norm(model: torch.nn.Module) -> torch.nn.Module:
    norms = [m for name, m in model.named_modules() if name in ("norm", "fc_norm", "norm_pre", "head.norm")]
    return next(m for m in norms[::-1] if hasattr(m, "weight"))


@pytest.mark.parametrize("layout", [name for name in NO_CHANCE if name != "convnext_rms"])
@torch.no_grad()
def test_distilled_tokens_of_maps_are_normalised(layout: str) -> None:
    dense, held = map_model(layout), held_model(layout)
    x = inputs(dense)
    norm = last_norm(dense)
    tokens = patches_of(dense, dense.forward_features(x))
    assert is_normalised(tokens, norm)
    for masked in (False, True):
        assert is_normalised(trace(held, x, masked=masked).patches_BnC, norm)


@pytest.mark.parametrize("layout", VIT_LAYOUTS)
@torch.no_grad()
def test_distilled_tokens_of_vits_are_normalised(layout: str) -> None:
    dense, x = small_model(layout), images()
    tokens = patches_of(dense, dense.forward_features(x))
    norm = last_norm(dense)
    assert is_normalised(tokens, norm)
    if layout not in ("prr", "no_pool"):
        model = apply_schedule(small_model(layout), Schedule((Stage(1, score="predictor", tokens=20),)))
        outcome = trace(model, x, masked=True)
        assert is_normalised(outcome.patches_BnC, norm)


def test_convnext_of_timm_compares_what_its_head_normalises() -> None:
    """The published ConvNeXt pools, then normalises; dynamic ConvNeXt compares normalised maps."""
    model = timm.create_model("convnext_tiny", depths=(1, 1, 4, 1), dims=(8, 16, 32, 64), num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        expected = F.layer_norm(features.permute(0, 2, 3, 1), (64,), model.head.norm.weight, model.head.norm.bias, 1e-6)
        torch.testing.assert_close(patches_of(model, features), expected.flatten(1, 2))
