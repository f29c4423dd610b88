"""Limits on metrics: how far values exceed them, also for metrics that are computed before any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunesearch.config import Limit, ModelConfig
from prunesearch.evaluate.metrics import METRICS
from prunesearch.schedule import Schedule

Limits = Sequence[tuple[str, Limit]]
"""Metrics by name, each with its bounds."""


def excess(limits: Limits, values: Mapping[str, float]) -> dict[str, float]:
    """How far each limited metric that has a value exceeds its limit, in the metric's unit. 0 or less: within it."""
    return {name: limit.excess(values[name]) for name, limit in limits if name in values}


def total_excess(limits: Limits, values: Mapping[str, float]) -> float:
    """Sum of how far limits are exceeded, each as a share of its bound. 0: within all of them."""
    found = excess(limits, values)
    return sum(max(found[name], 0.0) / _size(limit) for name, limit in limits if name in found)


def computed_excess(limits: Limits, model: ModelConfig, schedule: Schedule) -> dict[str, float]:
    """`excess` for metrics that are computed from the schedule. Raises ScheduleError when it does not fit the model."""
    values = {}
    for name, _ in limits:
        compute = METRICS[name].compute
        value = None if compute is None else compute(model, schedule)
        if value is not None:
            values[name] = value
    return excess(limits, values)


def is_within(limits: Limits, model: ModelConfig, schedule: Schedule) -> bool:
    """Whether a schedule keeps the limits on computed metrics. Raises ScheduleError as `computed_excess`."""
    return all(amount <= 0 for amount in computed_excess(limits, model, schedule).values())


def _size(limit: Limit) -> float:
    bound = limit.at_most if limit.at_most is not None else limit.at_least
    return abs(bound or 0.0) or 1.0
