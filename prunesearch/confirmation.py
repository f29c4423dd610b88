"""What is measured of candidates at the end: metrics after training with fresh seeds, and speeds as plain values.

The search's own value is biased upwards, because it was selected as the best of many noisy ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prunesearch.config import Objective
from prunesearch.evaluate import METRICS
from prunesearch.evaluate.task import Speed
from prunesearch.record import Record
from prunesearch.strict import to_mapping


@dataclass(frozen=True)
class Confirmation:
    """Means and sample standard deviations of metrics over fresh seeds.

    split: "validation" or "test", the images they were measured on. spread: the standard deviations; empty with one
    seed.
    """

    split: str
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]


def name_of(uid: str, split: str, index: int) -> str:
    """The uid of the index-th evaluation of a candidate with a fresh seed."""
    return f"{uid}.{split}{index}"


def confirmation_of(record: Record) -> Confirmation | None:
    """The confirmation of a candidate, or None. If some were measured on the test images, only those count."""
    for split in ("test", "validation"):
        found = [one for one in record.confirmations if one.uid.startswith(f"{record.uid}.{split}")]
        if found:
            values = {name: [one.value(name) for one in found] for name, _ in found[0].metrics}
            spread = {name: statistics.stdev(several) for name, several in values.items() if len(several) > 1}
            return Confirmation(
                split, len(found), {name: statistics.fmean(all_) for name, all_ in values.items()}, spread
            )
    return None


def confirmation_row(record: Record) -> dict[str, Any]:
    """`confirmation_of` as plain values for JSON and YAML; empty when there is none."""
    again = confirmation_of(record)
    if again is None:
        return {}
    return {
        "split": again.split,
        "seeds": again.seeds,
        "metrics": {name: round(value, 6) for name, value in again.mean.items()},
        "spread": {name: round(value, 6) for name, value in again.spread.items()},
    }


def speed_row(speed: Speed) -> dict[str, Any]:
    """A measured speed as plain values for JSON and YAML; `x_dense` is how many times as fast as the dense model."""
    if speed.ratio is None or speed.conditions is None:
        return {"problem": speed.problem}
    numbers = {
        "x_dense": speed.ratio,
        "low": speed.low,
        "high": speed.high,
        "predicted_x_dense": speed.predicted,
        "ms": speed.ms,
        "dense_ms": speed.dense_ms,
    }
    rounded = {name: float(f"{value:.5g}") for name, value in numbers.items() if value is not None}
    return {**rounded, **to_mapping(speed.conditions)}


def measured_objectives(objectives: Iterable[Objective]) -> list[Objective]:
    """The objectives that a seed can change. Those that are computed from the schedule alone are left out."""
    return [one for one in objectives if one.metric not in METRICS or not METRICS[one.metric].computed]


def mean_drop(records: Iterable[Record], objective: Objective) -> float | None:
    """How much worse the confirmed values are than the search's, on average, in the metric's unit.

    None when no record has a confirmation.
    """
    sign = 1.0 if objective.goal == "maximize" else -1.0
    drops = [
        sign * (record.evaluation.value(objective.metric) - again.mean[objective.metric])
        for record in records
        if (again := confirmation_of(record)) is not None and record.evaluation is not None
    ]
    return statistics.fmean(drops) if drops else None
