"""Move thresholds so that images cost what they should on average: all together, by bisection, without training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.predict import predict
from prunesearch.evaluate.schedule_loss import macs_by_counts
from prunesearch.models import schedule_of, shape_of, steps_of, threshold_of, threshold_unit
from prunesearch.schedule import Stage
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS

logger = logging.getLogger(__name__)

TOLERANCE = 0.002
"""Of the target; what is left is smaller than the difference between two samples of images."""
MOST_PASSES = 30
SUBSET_SEED = 0


def calibrate(
    model: nn.Module, images: ImageSet, count: int, batch_size: int, device: torch.device, amp: bool
) -> float:
    """Shift every threshold by the same number of typical scores until the mean cost of `count` images is the target.

    Thresholds on scores go up for a lower cost, those on the cosine of pairs go down. In place. Returns by how much the
    mean misses the target afterwards, as a fraction of it: what no shift can reach stays missed.
    """
    schedule, shape = schedule_of(model), shape_of(model)
    assert schedule is not None and schedule.target_gmacs is not None
    target = 1e9 * schedule.target_gmacs
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SUBSET_SEED))[:count]
    start = [
        (parameter, parameter.detach().clone(), _step_size(step.stage, shape))
        for step in steps_of(model)
        if (parameter := threshold_of(model, step)) is not None
    ]

    @torch.no_grad()
    def miss(shift: float) -> float:
        for parameter, value, size in start:
            parameter.copy_(value + shift * size)
        return mean_macs(model, images, chosen, shape, batch_size, device, amp) / target - 1

    shift = _root(miss)
    missed = miss(shift)
    if abs(missed) > 0.02:
        logger.warning(
            "the thresholds reach %.4g GMACs, not the target of %.4g", (1 + missed) * target / 1e9, target / 1e9
        )
    return missed


def mean_macs(
    model: nn.Module,
    images: ImageSet,
    chosen: Tensor,
    shape: ModelShape,
    batch_size: int,
    device: torch.device,
    amp: bool,
) -> float:
    """Mean MACs of the chosen images (indices), each by its own counts."""
    logits, _, counts = predict(model, images, batch_size, device, amp, indices=chosen)
    return macs_by_counts(counts, steps_of(model), shape, len(logits)).mean().item()


def _step_size(stage: Stage, shape: ModelShape) -> float:
    if REDUCERS[stage.reduce].ranks:
        return threshold_unit(stage, shape)
    return -0.1  # of a cosine: a lower threshold lets more pairs merge


def _root(miss: Callable[[float], float]) -> float:
    """The shift of least |miss|, which falls as the shift grows: a bracket by doubling, then bisection."""
    best = (math.inf, 0.0)

    def tried(shift: float) -> float:
        nonlocal best
        value = miss(shift)
        best = min(best, (abs(value), shift))
        return value

    value = tried(0.0)
    sign, step, low, high = math.copysign(1.0, value), 0.05, 0.0, 0.0
    passes = 1
    while passes < MOST_PASSES and abs(value) > TOLERANCE and value * sign > 0:
        low, high, step = high, high + sign * step, step * 2
        value, passes = tried(high), passes + 1
    while passes < MOST_PASSES and best[0] > TOLERANCE:
        middle = (low + high) / 2
        value, passes = tried(middle), passes + 1
        low, high = (middle, high) if value * sign > 0 else (low, middle)
    return best[1]
