"""The metrics, one function each. A metric is computed from the schedule alone, or measured on the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.config import MeasureConfig, ModelConfig
from prunesearch.cost import estimate_cost, macs_of_counts
from prunesearch.errors import DataError
from prunesearch.evaluate.build import model_shape, parameter_count
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.predict import Predictions, predict
from prunesearch.evaluate.schedule_loss import macs_by_counts
from prunesearch.evaluate.speed import Timing, peak_memory, time_batches
from prunesearch.models import learned_parameters, shape_of, steps_of
from prunesearch.registry import Registry
from prunesearch.schedule import Schedule

Goal = Literal["maximize", "minimize"]


class Measured(NamedTuple):
    """A value with its spread: half the interquartile range of the repetitions, in the metric's unit."""

    value: float
    spread: float


@dataclass(frozen=True)
class Metric:
    """A registered metric. `compute` is there when the value needs no weights, no data and no training."""

    name: str
    unit: str
    goal: Goal
    summary: str
    measure: Callable[[Subject], float | Measured]
    compute: Callable[[ModelConfig, Schedule], float | None] | None = None

    @property
    def computed(self) -> bool:
        """Whether the value is known before any training, so that limits on it cost nothing; with thresholds, where
        cost depends on the images, `compute` gives None and the value is measured."""
        return self.compute is not None


@dataclass
class Subject:
    """The model being measured, with what several metrics share: one pass over the validation images.

    dense_logits: gives the dense model's logits of the validation images, as it comes, (N, classes) float32 on CPU.
    """

    model: nn.Module
    config: ModelConfig
    schedule: Schedule
    validation: ImageSet
    settings: MeasureConfig
    device: torch.device
    amp: bool
    dense_logits: Callable[[], Tensor]

    @cached_property
    def outputs(self) -> Predictions:
        """What the model says of all validation images, in their order."""
        return predict(self.model, self.validation, self.settings.batch_size, self.device, self.amp)

    @cached_property
    def gmacs(self) -> Tensor:
        """GMACs of each validation image by its own token counts, (N), float64."""
        logits, _, counts = self.outputs
        return macs_by_counts(counts, steps_of(self.model), shape_of(self.model), len(logits)) / 1e9

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens after each block, prefix included: the mean over the validation images, rounded."""
        steps, shape = steps_of(self.model), shape_of(self.model)
        counts = [count.double().mean().item() for count in self.outputs.counts]
        fixed = [step.step.after for step in steps[: len(steps) - len(counts)]]
        _, _, tokens = macs_of_counts(shape, [step.step for step in steps], [*fixed, *counts])
        return tuple(round(count) for count in tokens)

    def batches(self, batch_size: int) -> list[Tensor]:
        """A few batches of validation images on the device, for measuring speed and memory: with thresholds these
        depend on what is in the picture."""
        indices = torch.arange(SPEED_BATCHES * batch_size) % len(self.validation)
        return [images for images, _ in self.validation.batches(indices.split(batch_size), self.device)]

    def time(self, batch_size: int) -> Timing:
        """Seconds of one forward pass."""
        return time_batches(self.model, self.batches(batch_size), self.settings.speed_seconds, self.amp)


METRICS: Registry[Metric] = Registry("metric")
SPEED_BATCHES = 4
"""Different batches that a speed measurement goes through in turn."""


Compute = Callable[[ModelConfig, Schedule], "float | None"]


def computed_metric(
    name: str, *, unit: str, goal: Goal, summary: str, measure: Callable[[Subject], float | Measured] | None = None
) -> Callable[[Compute], Compute]:
    """Register a function of model configuration and schedule alone. Where it gives None, `measure` is asked."""

    def register(compute: Compute) -> Compute:
        def value(subject: Subject) -> float | Measured:
            computed = compute(subject.config, subject.schedule)
            if computed is not None:
                return computed
            assert measure is not None, f"{name} gave None"
            return measure(subject)

        METRICS.add(name, Metric(name, unit, goal, summary, value, compute))
        return compute

    return register


def measured_metric(
    name: str, *, unit: str, goal: Goal, summary: str
) -> Callable[[Callable[[Subject], float | Measured]], Callable[[Subject], float | Measured]]:
    """Register a function of a `Subject`. A measurement that repeats returns `Measured`."""

    def register(measure: Callable[[Subject], float | Measured]) -> Callable[[Subject], float | Measured]:
        METRICS.add(name, Metric(name, unit, goal, summary, measure))
        return measure

    return register


@measured_metric("top1", unit="%", goal="maximize", summary="validation images whose first guess is right")
def top1(subject: Subject) -> float:
    """Percent."""
    return _top(subject, 1)


@measured_metric("top5", unit="%", goal="maximize", summary="validation images with the right class among five guesses")
def top5(subject: Subject) -> float:
    """Percent. Raises DataError below six classes, where it would always be 100."""
    return _top(subject, 5)


@measured_metric("loss", unit="nats", goal="minimize", summary="cross entropy on the validation images")
def loss(subject: Subject) -> float:
    """Mean over images, without label smoothing."""
    logits, labels, _ = subject.outputs
    return F.cross_entropy(logits, labels).item()


@measured_metric("agreement", unit="%", goal="maximize", summary="validation images classified as the dense model does")
def agreement(subject: Subject) -> float:
    """Percent. The dense model is the one before any fine-tuning, so a fine-tuned dense model is below 100 too."""
    same = subject.outputs.logits.argmax(dim=1) == subject.dense_logits().argmax(dim=1)
    return 100 * same.double().mean().item()


def _mean_gmacs(subject: Subject) -> Measured:
    low, high = subject.gmacs.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return Measured(subject.gmacs.mean().item(), (high - low) / 2)


@computed_metric(
    "gmacs",
    unit="GMACs",
    goal="minimize",
    summary="multiply-accumulates of one image, closed form; with thresholds the mean over validation images",
    measure=_mean_gmacs,
)
def gmacs(model: ModelConfig, schedule: Schedule) -> float | None:
    """10^9 multiply-accumulates; what papers call FLOPs. With thresholds the mean of each image's own, not the cost of
    mean counts, which is less as attention is quadratic."""
    return None if schedule.is_adaptive else estimate_cost(model_shape(model), schedule).gmacs


@computed_metric(
    "gmacs_p95",
    unit="GMACs",
    goal="minimize",
    summary="what 95 % of the images do not exceed; differs from gmacs only with thresholds",
    measure=lambda subject: subject.gmacs.quantile(0.95).item(),
)
def gmacs_p95(model: ModelConfig, schedule: Schedule) -> float | None:
    """10^9 multiply-accumulates."""
    return gmacs(model, schedule)


@measured_metric(
    "target_miss", unit="%", goal="minimize", summary="by how much gmacs misses the schedule's target_gmacs; 0 without"
)
def target_miss(subject: Subject) -> float:
    """Percent of the target, above or below."""
    target = subject.schedule.target_gmacs
    return 0.0 if target is None else 100 * abs(subject.gmacs.mean().item() / target - 1)


@computed_metric("parameters", unit="M", goal="minimize", summary="parameters of the model, in millions")
def parameters(model: ModelConfig, schedule: Schedule) -> float:
    """Millions, with what the schedule learns."""
    return (parameter_count(model) + learned_parameters(schedule, model_shape(model))) / 1e6


@measured_metric("latency_ms", unit="ms", goal="minimize", summary="time of one image alone (batch 1), median")
def latency_ms(subject: Subject) -> Measured:
    """Milliseconds, after warm-up, synchronised."""
    timing = subject.time(1)
    return Measured(1e3 * timing.median, 1e3 * timing.spread)


@measured_metric("throughput", unit="images/s", goal="maximize", summary="images per second in batches, median")
def throughput(subject: Subject) -> Measured:
    """At `measure.speed_batch_size`, after warm-up, synchronised."""
    batch_size = subject.settings.speed_batch_size
    timing = subject.time(batch_size)
    return Measured(batch_size / timing.median, (batch_size / timing.low - batch_size / timing.high) / 2)


@measured_metric("peak_memory_mb", unit="MB", goal="minimize", summary="memory of weights and one batch of activations")
def peak_memory_mb(subject: Subject) -> float:
    """10^6 bytes of weights, input and activations at `measure.speed_batch_size`; see `speed.peak_memory`."""
    images = subject.batches(subject.settings.speed_batch_size)[0]
    return peak_memory(subject.model, images, subject.amp) / 1e6


def _top(subject: Subject, guesses: int) -> float:
    logits, labels, _ = subject.outputs
    classes = logits.shape[1]
    if classes <= guesses:
        raise DataError(
            f"metric top{guesses}: the data set has {classes} classes, so every image would count as right. "
            f"Possible: {guesses + 1} classes or more. Leave it out, or use another metric."
        )
    right = (logits.topk(guesses, dim=1).indices == labels[:, None]).any(dim=1)
    return 100 * right.double().mean().item()
