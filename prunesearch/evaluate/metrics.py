"""The table of metrics: the facts of each, and where its function is. Imports nothing heavy.

A metric is computed from the schedule alone, or measured on the model. To add one, write its function in `measures.py`
and an entry at the end of this file. A plug-in decorates its functions with `computed_metric` and `measured_metric`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from prunesearch.config import ModelConfig
from prunesearch.cost import estimate_cost
from prunesearch.evaluate.shapes import model_shape
from prunesearch.registry import Named, Registry, lazily
from prunesearch.schedule import Schedule

Goal = Literal["maximize", "minimize"]


class Measured(NamedTuple):
    """A value with its spread: half the interquartile range over repetitions or images, in the metric's unit."""

    value: float
    spread: float


__getattr__ = lazily(__name__, {"Subject": "prunesearch.evaluate.measures"})  # plug-ins may import it from here
Compute = Callable[[ModelConfig, Schedule], "float | None"]
Measure = Callable[[Any], "float | Measured"]
"""Called with a `measures.Subject`."""


@dataclass(frozen=True)
class Metric:
    """A registered metric. compute: for values that need no weights, data or training; else None."""

    name: str
    unit: str
    goal: Goal
    summary: str
    measure: Measure
    compute: Compute | None = None

    @property
    def computed(self) -> bool:
        """Whether the value is known before any training, so that a limit on it rejects candidates without training.

        With thresholds the cost depends on the images: `compute` then returns None, and the value is measured.
        """
        return self.compute is not None


METRICS: Registry[Metric] = Registry("metric")


def computed_metric(
    name: str, *, unit: str, goal: Goal, summary: str, measure: Measure | None = None
) -> Callable[[Compute], Compute]:
    """Register a function of model configuration and schedule alone. When it returns None, `measure` is called."""

    def register(compute: Compute) -> Compute:
        METRICS.add(name, Metric(name, unit, goal, summary, _computed_or(compute, measure), compute))
        return compute

    return register


def measured_metric(name: str, *, unit: str, goal: Goal, summary: str) -> Callable[[Measure], Measure]:
    """Register a function of a `Subject`. It returns a number, or `Measured` for a value with a spread."""

    def register(measure: Measure) -> Measure:
        METRICS.add(name, Metric(name, unit, goal, summary, measure))
        return measure

    return register


def gmacs(model: ModelConfig, schedule: Schedule) -> float | None:
    """10^9 multiply-accumulates, which papers call FLOPs. None with thresholds.

    Then the mean over images is measured. The cost of mean counts would be too low, because attention is quadratic.
    """
    return None if schedule.is_adaptive else estimate_cost(model_shape(model), schedule).gmacs


def _computed_or(compute: Compute, measure: Measure | None = None) -> Measure:
    """A measure that returns the value of `compute`, or that of `measure` when it is None."""

    def value(subject: Any) -> float | Measured:
        computed = compute(subject.config, subject.schedule)
        if computed is not None:
            return computed
        assert measure is not None, "a metric gave None that nothing measures"
        return measure(subject)

    return value


for _entry in (
    Metric(
        "top1",
        unit="%",
        goal="maximize",
        summary="validation images whose first guess is right",
        measure=Named("prunesearch.evaluate.measures:top1"),
    ),
    Metric(
        "top5",
        unit="%",
        goal="maximize",
        summary="validation images with the right class among five guesses",
        measure=Named("prunesearch.evaluate.measures:top5"),
    ),
    Metric(
        "loss",
        unit="nats",
        goal="minimize",
        summary="cross entropy on the validation images",
        measure=Named("prunesearch.evaluate.measures:loss"),
    ),
    Metric(
        "agreement",
        unit="%",
        goal="maximize",
        summary="validation images classified as the dense model does",
        measure=Named("prunesearch.evaluate.measures:agreement"),
    ),
    Metric(
        "gmacs",
        unit="GMACs",
        goal="minimize",
        summary="multiply-accumulates of one image, closed form; with thresholds the mean over validation images",
        measure=_computed_or(gmacs, Named("prunesearch.evaluate.measures:mean_gmacs")),
        compute=gmacs,
    ),
    Metric(
        "gmacs_p95",
        unit="GMACs",
        goal="minimize",
        summary="what 95 % of the images do not exceed; differs from gmacs only with thresholds",
        measure=_computed_or(gmacs, Named("prunesearch.evaluate.measures:gmacs_p95")),
        compute=gmacs,
    ),
    Metric(
        "target_miss",
        unit="%",
        goal="minimize",
        summary="by how much gmacs misses the schedule's target_gmacs; 0 without",
        measure=Named("prunesearch.evaluate.measures:target_miss"),
    ),
    Metric(
        "parameters",
        unit="M",
        goal="minimize",
        summary="parameters of the model, in millions",
        measure=_computed_or(Named("prunesearch.evaluate.measures:parameters")),
        compute=Named("prunesearch.evaluate.measures:parameters"),
    ),
    Metric(
        "latency_ms",
        unit="ms",
        goal="minimize",
        summary="time of one image alone (batch 1), median",
        measure=Named("prunesearch.evaluate.measures:latency_ms"),
    ),
    Metric(
        "throughput",
        unit="images/s",
        goal="maximize",
        summary="images per second in batches, median",
        measure=Named("prunesearch.evaluate.measures:throughput"),
    ),
    Metric(
        "peak_memory_mb",
        unit="MB",
        goal="minimize",
        summary="memory of weights and one batch of activations",
        measure=Named("prunesearch.evaluate.measures:peak_memory_mb"),
    ),
):
    METRICS.add(_entry.name, _entry)
