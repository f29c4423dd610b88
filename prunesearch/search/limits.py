"""The limits of a study: by how much a value breaks one, and what arithmetic knows before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from prunesearch.config import StudyConfig
from prunesearch.evaluate import METRICS
from prunesearch.schedule import Schedule


def excess(config: StudyConfig, values: Mapping[str, float]) -> dict[str, float]:
    """By how much each limited metric that has a value breaks its limit, in the metric's unit; 0 or less is within."""
    found: dict[str, float] = {}
    for name, limit in config.limits:
        if name in values:
            found[name] = limit.excess(values[name])
    return found


def total_excess(config: StudyConfig, values: Mapping[str, float]) -> float:
    """By how much all limits together are broken, each as a share of its bound; 0 is within all of them."""
    total = 0.0
    for name, amount in excess(config, values).items():
        limit = dict(config.limits)[name]
        bound = limit.at_most if limit.at_most is not None else limit.at_least
        total += max(amount, 0.0) / (abs(bound or 0.0) or 1.0)
    return total


def computed_excess(config: StudyConfig, schedule: Schedule) -> dict[str, float]:
    """The same for the metrics that arithmetic gives. Raises ScheduleError when the schedule does not fit the model."""
    values = {}
    for name, _ in config.limits:
        compute = METRICS[name].compute
        value = None if compute is None else compute(config.model, schedule)
        if value is not None:
            values[name] = value
    return excess(config, values)
