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
from prunesearch.cost import estimate_cost
from prunesearch.errors import DataError
from prunesearch.evaluate.build import model_shape, parameter_count
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.predict import predict
from prunesearch.evaluate.speed import Timing, peak_memory, time_batches
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
    compute: Callable[[ModelConfig, Schedule], float] | None = None

    @property
    def computed(self) -> bool:
        """Whether the value is known before any training, so that limits on it cost nothing."""
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
    def outputs(self) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) in float32 and labels (N), on CPU, of all validation images in order."""
        return predict(self.model, self.validation, self.settings.batch_size, self.device, self.amp)

    def time(self, batch_size: int) -> Timing:
        """Seconds of one forward pass."""
        size, seconds = self.validation.input.size, self.settings.speed_seconds
        return time_batches(self.model, size, batch_size, seconds, self.device, self.amp)


METRICS: Registry[Metric] = Registry("metric")


def computed_metric(
    name: str, *, unit: str, goal: Goal, summary: str
) -> Callable[[Callable[[ModelConfig, Schedule], float]], Callable[[ModelConfig, Schedule], float]]:
    """Register a function of model configuration and schedule alone."""

    def register(compute: Callable[[ModelConfig, Schedule], float]) -> Callable[[ModelConfig, Schedule], float]:
        def measure(subject: Subject) -> float:
            return compute(subject.config, subject.schedule)

        METRICS.add(name, Metric(name, unit, goal, summary, measure, compute))
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
    logits, labels = subject.outputs
    return F.cross_entropy(logits, labels).item()


@measured_metric("agreement", unit="%", goal="maximize", summary="validation images classified as the dense model does")
def agreement(subject: Subject) -> float:
    """Percent. The dense model is the one before any fine-tuning, so a fine-tuned dense model is below 100 too."""
    same = subject.outputs[0].argmax(dim=1) == subject.dense_logits().argmax(dim=1)
    return 100 * same.double().mean().item()


@computed_metric("gmacs", unit="GMACs", goal="minimize", summary="multiply-accumulates of one image, closed form")
def gmacs(model: ModelConfig, schedule: Schedule) -> float:
    """10^9 multiply-accumulates; what papers call FLOPs."""
    return estimate_cost(model_shape(model), schedule).gmacs


@computed_metric("parameters", unit="M", goal="minimize", summary="parameters of the model, in millions")
def parameters(model: ModelConfig, schedule: Schedule) -> float:
    """Millions. No schedule so far adds or removes any."""
    return parameter_count(model) / 1e6


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
    size, batch_size = subject.validation.input.size, subject.settings.speed_batch_size
    return peak_memory(subject.model, size, batch_size, subject.device, subject.amp) / 1e6


def _top(subject: Subject, guesses: int) -> float:
    logits, labels = subject.outputs
    classes = logits.shape[1]
    if classes <= guesses:
        raise DataError(
            f"metric top{guesses}: the data set has {classes} classes, so every image would count as right. "
            f"Possible: {guesses + 1} classes or more. Leave it out, or use another metric."
        )
    right = (logits.topk(guesses, dim=1).indices == labels[:, None]).any(dim=1)
    return 100 * right.double().mean().item()
