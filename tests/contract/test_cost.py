"""The closed form against published figures and against PyTorch's own count of a real forward pass."""

from __future__ import annotations

import pytest
import timm
import torch
from small_models import LAYOUTS, images, pairs, small_model, two_stages
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.cost import estimate_cost
from prunesearch.models import apply_schedule, shape_of
from prunesearch.presets import load_preset
from prunesearch.schedule import ModelShape, Schedule, Stage

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")


def shape(name: str) -> ModelShape:
    with torch.device("meta"):
        return shape_of(timm.create_model(name))


def counted(model: torch.nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:  # not under no_grad: its module tracker wants gradients
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "gmacs"), [("tiny", 1.25), ("small", 4.60), ("base", 17.6)])
def test_dense_deit(name: str, gmacs: float) -> None:
    digits = 1 if gmacs > 10 else 2
    assert round(estimate_cost(shape(f"deit_{name}_patch16_224")).gmacs, digits) == gmacs


@pytest.mark.parametrize(
    ("preset", "gmacs", "tokens"),
    [
        ("evit-0.7", 3.0, (139, 98, 69)),
        ("evit-0.5", 2.3, None),
        ("evit-fuse-0.9", 4.02, None),
        ("evit-fuse-0.8", 3.48, None),
        ("evit-fuse-0.7", 3.03, (140, 100, 72)),
        ("evit-fuse-0.6", 2.64, None),
        ("evit-fuse-0.5", 2.31, (100, 52, 28)),
    ],
)
def test_published_deit_small(preset: str, gmacs: float, tokens: tuple[int, ...] | None) -> None:
    small = shape("deit_small_patch16_224")
    cost = estimate_cost(small, load_preset(preset, small))
    assert round(cost.gmacs, len(str(gmacs).split(".")[1])) == gmacs
    if tokens:
        assert (cost.tokens[3], cost.tokens[6], cost.tokens[9]) == tokens
        assert cost.attention_tokens[3] == 197 and cost.attention_tokens[4] == tokens[0]


@pytest.mark.parametrize(
    ("model", "rate", "gmacs", "left"),
    [
        ("deit_small_patch16_224", 8, 3.42, 101),
        ("deit_small_patch16_224", 13, 2.70, 41),
        ("deit_small_patch16_224", 16, 2.29, 11),
        ("deit_tiny_patch16_224", 8, 0.92, 101),
        ("deit_tiny_patch16_224", 16, 0.62, 11),
        ("vit_large_patch16_224", 8, 31.0, 7),
    ],
)
def test_published_tome(model: str, rate: int, gmacs: float, left: int) -> None:
    cost = estimate_cost(shape(model), load_preset(f"tome-r{rate}", shape(model)))
    # the published figures do not count the matching of pairs, which is what the 0.5 % is for
    assert cost.gmacs == pytest.approx(gmacs, rel=0.005 + 0.005 / gmacs)
    assert cost.tokens[-1] == left


def test_published_dynamicvit_counts_without_its_predictors() -> None:
    stages = tuple(Stage(b, at="pre", score="random", tokens=t) for b, t in ((3, 137), (6, 96), (9, 67)))
    cost = estimate_cost(shape("deit_small_patch16_224"), Schedule(stages))
    assert round(cost.gmacs, 2) == 2.88
    assert (cost.attention_tokens[3], cost.attention_tokens[6], cost.attention_tokens[9]) == (138, 97, 68)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_agrees_with_the_flop_counter(layout: str) -> None:
    model = small_model(layout)
    assert estimate_cost(shape_of(model)).macs == pytest.approx(counted(model, images(1)), rel=0.001)


@pytest.mark.parametrize("layout", ["class", "registers", "avg", "gate"])
@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), pairs())
def test_every_pair_agrees_with_the_flop_counter(score: str, verb: str, at: str, layout: str) -> None:
    model = small_model(layout)
    schedule = two_stages(score, verb, at)
    estimated = estimate_cost(shape_of(model), schedule).macs
    assert estimated == pytest.approx(counted(apply_schedule(model, schedule), images(1)), rel=0.01)


def test_a_stage_that_removes_nothing_is_free() -> None:
    model_shape = shape_of(small_model())
    idle = Schedule((Stage(1, keep=1.0, score="attention_received", reduce="squeeze"),))
    assert estimate_cost(model_shape, idle) == estimate_cost(model_shape)
