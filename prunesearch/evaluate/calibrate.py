"""Shift all thresholds of a model together, by bisection, until the mean cost of images is the target."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunesearch.cost import CostTable, target_of
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.predict import predict
from prunesearch.evaluate.schedule_loss import cost_by_counts
from prunesearch.models import schedule_of, shape_of, steps_of, threshold_of, threshold_unit
from prunesearch.profile import Profile
from prunesearch.schedule import Stage
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS

logger = logging.getLogger(__name__)

TOLERANCE = 0.002
"""Share of the target by which the mean may miss it. Two samples of images differ by more."""
MOST_PASSES = 30
SUBSET_SEED = 0


def calibrate(
    model: nn.Module,
    images: ImageSet,
    count: int,
    batch_size: int,
    device: torch.device,
    amp: bool,
    profile: Profile | None = None,
) -> float:
    """Shift every threshold, in place, until the mean cost of `count` images is the schedule's target.

    All thresholds shift by the same number of typical scores. For a lower cost, thresholds on scores go up and those on
    the cosine of pairs go down. Returns by how much the mean then misses the target, as a fraction of it; no shift may
    reach the target. profile: of the device, for a target in milliseconds; without it that raises DeviceError.
    """
    schedule, shape = schedule_of(model), shape_of(model)
    found = None if schedule is None else target_of(schedule, profile)
    assert found is not None, "only thresholds with a target are calibrated"
    amount, table = found
    target = table.per_unit * amount
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
        return mean_cost(model, images, chosen, shape, batch_size, device, amp, table) / target - 1

    shift = _root(miss)
    missed = miss(shift)
    if abs(missed) > 0.02:
        reached = (1 + missed) * target / table.per_unit
        logger.warning("the thresholds reach %.4g %s, not the target of %.4g", reached, table.unit, amount)
    return missed


def mean_cost(
    model: nn.Module,
    images: ImageSet,
    chosen: Tensor,
    shape: ModelShape,
    batch_size: int,
    device: torch.device,
    amp: bool,
    table: CostTable,
) -> float:
    """Mean cost of the images with the indices `chosen`, each by its own token counts."""
    logits, _, counts = predict(model, images, batch_size, device, amp, indices=chosen)
    return cost_by_counts(counts, steps_of(model), shape, len(logits), table).mean().item()


def _step_size(stage: Stage, shape: ModelShape) -> float:
    if REDUCERS[stage.reduce].ranks:
        return threshold_unit(stage, shape)
    return -0.1  # in cosines; negative, because a lower threshold lets more pairs merge


def _root(miss: Callable[[float], float]) -> float:
    """The shift with the least |miss|: find a bracket by doubling, then bisect. `miss` falls as the shift grows."""
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
