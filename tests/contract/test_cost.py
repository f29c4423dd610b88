"""Estimated MACs agree with PyTorch's flop counter. Published figures are in test_published.py."""

from __future__ import annotations

import pytest
import torch
from small_models import LAYOUTS, images, pairs, small_model, two_stages
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.cost import estimate_cost
from prunesearch.models import apply_schedule, shape_of
from prunesearch.schedule import Schedule, Stage

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")


def counted(model: torch.nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:  # its module tracker needs gradients, so no no_grad
        model(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_agrees_with_the_flop_counter(layout: str) -> None:
    model = small_model(layout)
    assert estimate_cost(shape_of(model)).macs == pytest.approx(counted(model, images(1)), rel=0.001)


@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), pairs())
def test_macs_are_arithmetic(score: str, verb: str, at: str) -> None:
    check_macs(small_model(), score, verb, at)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_macs_of_all_layouts_are_arithmetic(layout: str) -> None:
    check_macs(small_model(layout), "attention_received", "squeeze", "mid")


def check_macs(model: torch.nn.Module, score: str, verb: str, at: str) -> None:
    schedule = two_stages(score, verb, at)
    estimated = estimate_cost(shape_of(model), schedule).macs
    assert estimated == pytest.approx(counted(apply_schedule(model, schedule), images(1)), rel=0.01)


def test_a_stage_that_removes_nothing_is_free() -> None:
    model_shape = shape_of(small_model())
    idle = Schedule((Stage(1, keep=1.0, score="attention_received", reduce="squeeze"),))
    assert estimate_cost(model_shape, idle) == estimate_cost(model_shape)
