"""Limits on metrics: by how much a value breaks one, and what arithmetic knows before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunesearch.config import Limit, ModelConfig
from prunesearch.evaluate.metrics import METRICS
from prunesearch.schedule import Schedule

Limits = Sequence[tuple[str, Limit]]
"""Metrics by name, each with its bounds."""


def excess(limits: Limits, values: Mapping[str, float]) -> dict[str, float]:
    """By how much each limited metric that has a value breaks its limit, in the metric's unit; 0 or less is within."""
    return {name: limit.excess(values[name]) for name, limit in limits if name in values}


def total_excess(limits: Limits, values: Mapping[str, float]) -> float:
    """By how much all limits together are broken, each as a share of its bound; 0 is within all of them."""
    found = excess(limits, values)
    return sum(max(found[name], 0.0) / _size(limit) for name, limit in limits if name in found)


def computed_excess(limits: Limits, model: ModelConfig, schedule: Schedule) -> dict[str, float]:
    """`excess` for the metrics that arithmetic gives. Raises ScheduleError when the schedule does not fit the model."""
    values = {}
    for name, _ in limits:
        compute = METRICS[name].compute
        value = None if compute is None else compute(model, schedule)
        if value is not None:
            values[name] = value
    return excess(limits, values)


def is_within(limits: Limits, model: ModelConfig, schedule: Schedule) -> bool:
    """Whether a schedule keeps the limits that arithmetic knows. Raises ScheduleError as `computed_excess`."""
    return all(amount <= 0 for amount in computed_excess(limits, model, schedule).values())


def _size(limit: Limit) -> float:
    bound = limit.at_most if limit.at_most is not None else limit.at_least
    return abs(bound or 0.0) or 1.0
