"""The table of metrics: the facts of each, and where its function is. Imports nothing heavy.

A metric is computed from the schedule alone, or measured on the model. To add one, write its function in `measures.py`
and an entry at the end of this file. A plug-in decorates its functions with `computed_metric` and `measured_metric`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from prunesearch.config import ModelConfig, Target
from prunesearch.cost import MACS, CostTable, total_cost
from prunesearch.errors import DeviceError
from prunesearch.evaluate.shapes import model_shape
from prunesearch.registry import Named, Registry, lazily
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape

Goal = Literal["maximize", "minimize"]
Output = Literal["classes", "patches", "features"]
"""What a model gives: classes of a picture, classes of its patches, or features."""


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
    """A registered metric.

    compute, costs: for values that need no weights, data or training; else None. compute: of model and schedule.
    costs: the table whose costs add up to the value, for the target of a study. needs_profile: `costs` raises
    DeviceError when the target has no profile. of_output: how it reads the model's output: as logits of classes, of the
    classes of patches, or as features; empty when it reads no output. needs_labels: it compares with the images'
    labels. needs_places: with the patch tokens at the end, all of which must be in their places then.
    """

    name: str
    unit: str
    goal: Goal
    summary: str
    measure: Measure
    compute: Compute | None = None
    costs: Callable[[Target], CostTable] | None = None
    needs_profile: bool = False
    of_output: tuple[Output, ...] = ()
    needs_labels: bool = False
    needs_places: bool = False

    @property
    def computed(self) -> bool:
        """Whether the value is known before any training, so that a limit on it rejects candidates without training.

        With thresholds a cost depends on the images: `of` then returns None, and the value is measured.
        """
        return self.compute is not None or self.costs is not None

    def of(self, target: Target, schedule: Schedule) -> float | None:
        """The value of a schedule, if arithmetic gives it. Raises ScheduleError when it does not fit the model."""
        if self.costs is None:
            return None if self.compute is None else self.compute(target.model, schedule)
        # the cost of mean counts would be too low, because attention is quadratic
        return None if schedule.is_adaptive else total_cost(model_shape(target.model), schedule, self.costs(target))


METRICS: Registry[Metric] = Registry("metric")


def computed_metric(
    name: str, *, unit: str, goal: Goal, summary: str, measure: Measure | None = None
) -> Callable[[Compute], Compute]:
    """Register a function of model configuration and schedule alone. When it returns None, `measure` is called."""

    def register(compute: Compute) -> Compute:
        METRICS.add(name, Metric(name, unit, goal, summary, _computed_or(name, measure), compute))
        return compute

    return register


def measured_metric(name: str, *, unit: str, goal: Goal, summary: str) -> Callable[[Measure], Measure]:
    """Register a function of a `Subject`. It returns a number, or `Measured` for a value with a spread."""

    def register(measure: Measure) -> Measure:
        METRICS.add(name, Metric(name, unit, goal, summary, measure))
        return measure

    return register


_OUTPUTS = {"classes": "classes", "patches": "classes of patches", "features": "features"}


def output_of(shape: ModelShape) -> tuple[Output, str]:
    """What a model gives, and the reason for it."""
    if shape.segments:
        return "patches", "gives classes to each patch (model.head)"
    if shape.gives_features:
        return "features", "has no classifier"
    return "classes", "has a classifier (num_classes: 0 builds it without, model.head gives classes to each patch)"


def misread(name: str, shape: ModelShape) -> str | None:
    """Why a metric cannot read what a model of this shape gives; None when it can."""
    wanted, (has, why) = METRICS[name].of_output, output_of(shape)
    if not wanted or has in wanted:
        return None
    fitting = ", ".join(other for other, metric in METRICS.items() if has in metric.of_output)
    reads = f"{name} reads {_OUTPUTS[wanted[0]]}, but the model {why}"
    return f"{reads}. Possible: {fitting}. Name those, or change the model."


def profile_of(target: Target) -> CostTable:
    """The profile of a study's device. Raises DeviceError when there is none."""
    if target.profile is None:
        raise DeviceError(
            "predicted_latency_ms: there is no profile of a device to predict it by. Possible: a file of `prunesearch "
            "profile`, or measuring here. Write device: {profile: FILE.json}, or device: {batch: 16}."
        )
    return target.profile


def _computed_or(name: str, measure: Measure | None = None) -> Measure:
    """A measure that returns the value by arithmetic, or that of `measure` where there is none."""

    def value(subject: Any) -> float | Measured:
        computed = METRICS[name].of(subject.target, subject.schedule)
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
        of_output=("classes",),
        needs_labels=True,
    ),
    Metric(
        "top5",
        unit="%",
        goal="maximize",
        summary="validation images with the right class among five guesses",
        measure=Named("prunesearch.evaluate.measures:top5"),
        of_output=("classes",),
        needs_labels=True,
    ),
    Metric(
        "loss",
        unit="nats",
        goal="minimize",
        summary="cross entropy on the validation images (or their pixels)",
        measure=Named("prunesearch.evaluate.measures:loss"),
        of_output=("classes", "patches"),
        needs_labels=True,
    ),
    Metric(
        "agreement",
        unit="%",
        goal="maximize",
        summary="validation images (or their pixels) classified as the dense model does",
        measure=Named("prunesearch.evaluate.measures:agreement"),
        of_output=("classes", "patches"),
    ),
    Metric(
        "miou",
        unit="%",
        goal="maximize",
        summary="segmentation: intersection over union of a class's pixels, mean over classes",
        measure=Named("prunesearch.evaluate.measures:miou"),
        of_output=("patches",),
        needs_labels=True,
    ),
    Metric(
        "pixel_accuracy",
        unit="%",
        goal="maximize",
        summary="segmentation: pixels whose class is right",
        measure=Named("prunesearch.evaluate.measures:pixel_accuracy"),
        of_output=("patches",),
        needs_labels=True,
    ),
    Metric(
        "feature_similarity",
        unit="%",
        goal="maximize",
        summary="cosine of the pooled features with the dense model's, mean over validation images",
        measure=Named("prunesearch.evaluate.measures:feature_similarity"),
        of_output=("features",),
    ),
    Metric(
        "patch_similarity",
        unit="%",
        goal="maximize",
        summary="cosine of the patch features with the dense model's; all tokens must be back at the end",
        measure=Named("prunesearch.evaluate.measures:patch_similarity"),
        needs_places=True,
    ),
    Metric(
        "knn_top1",
        unit="%",
        goal="maximize",
        summary="validation images whose class the 20 nearest training images say, by the cosine of features",
        measure=Named("prunesearch.evaluate.measures:knn_top1"),
        of_output=("features",),
        needs_labels=True,
    ),
    Metric(
        "gmacs",
        unit="GMACs",
        goal="minimize",
        summary="multiply-accumulates of one image, closed form; with thresholds the mean over validation images",
        measure=_computed_or("gmacs", Named("prunesearch.evaluate.measures:mean_gmacs")),
        costs=lambda target: MACS,
    ),
    Metric(
        "gmacs_p95",
        unit="GMACs",
        goal="minimize",
        summary="what 95 % of the images do not exceed; differs from gmacs only with thresholds",
        measure=_computed_or("gmacs_p95", Named("prunesearch.evaluate.measures:gmacs_p95")),
        costs=lambda target: MACS,
    ),
    Metric(
        "target_miss",
        unit="%",
        goal="minimize",
        summary="by how much the mean cost of images misses the target of the schedule; 0 without",
        measure=Named("prunesearch.evaluate.measures:target_miss"),
    ),
    Metric(
        "parameters",
        unit="M",
        goal="minimize",
        summary="parameters of the model, in millions",
        measure=_computed_or("parameters"),
        compute=Named("prunesearch.evaluate.measures:parameters"),
    ),
    Metric(
        "predicted_latency_ms",
        unit="ms",
        goal="minimize",
        summary="time of a batch on the target device, by its profile; with thresholds the mean over images",
        measure=_computed_or("predicted_latency_ms", Named("prunesearch.evaluate.measures:mean_predicted_latency_ms")),
        costs=profile_of,
        needs_profile=True,
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
