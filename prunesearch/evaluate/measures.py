"""The functions of the metrics, which measure a model on held-out images; `metrics.py` has their table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.config import MeasureConfig, ModelConfig, Target
from prunesearch.cost import MACS, CostTable, cost_of_counts, target_of
from prunesearch.errors import DataError
from prunesearch.evaluate.build import build_model, parameter_count
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.metrics import Measured, profile_of
from prunesearch.evaluate.predict import Predictions, autocast, predict, reproducible
from prunesearch.evaluate.schedule_loss import cost_by_counts
from prunesearch.evaluate.shapes import model_shape
from prunesearch.evaluate.speed import Timing, peak_memory, time_batches
from prunesearch.models import learned_parameters, patches_of, refuse_missing_places, shape_of, steps_of
from prunesearch.models.dense_head import IGNORED, resized
from prunesearch.schedule import Schedule

NEIGHBOURS, KNN_BATCH = 20, 256
"""Training images that vote on the class of an image; images that are looked up at a time."""
PIXEL_BATCH = 32
"""Images whose logits are resized to pixels at a time."""
SPEED_BATCHES = 4
"""Number of different batches that a speed measurement uses in turn."""


@dataclass
class Subject:
    """The model being measured. Metrics share one pass over the validation images.

    validation: the images of the task's split, which may be the test images. dense_logits: returns the logits (or the
    features) of the original dense model on them, (N, classes) float32 on the CPU. dense: that model. train: the
    training images.
    """

    model: nn.Module
    target: Target
    schedule: Schedule
    validation: ImageSet
    settings: MeasureConfig
    device: torch.device
    amp: bool
    dense_logits: Callable[[], Tensor]
    dense: ModelConfig
    train: ImageSet

    @cached_property
    def outputs(self) -> Predictions:
        """Predictions of the model for all validation images, in their order."""
        return predict(self.model, self.validation, self.settings.batch_size, self.device, self.amp)

    def costs(self, table: CostTable = MACS) -> Tensor:
        """Cost of each validation image by its own token counts, (N), float64, in the unit of the table."""
        logits, _, counts = self.outputs
        return cost_by_counts(counts, steps_of(self.model), shape_of(self.model), len(logits), table) / table.per_unit

    @cached_property
    def confusion(self) -> Tensor:
        """Pixels of each class (rows) that were taken for each class (columns), of a model that segments."""
        logits, masks, _ = self.outputs
        classes = logits.shape[1]
        found = torch.zeros(classes * classes, dtype=torch.int64)
        for some, theirs in zip(logits.split(PIXEL_BATCH), masks.split(PIXEL_BATCH), strict=True):
            known, guesses = theirs != IGNORED, pixel_classes(some, theirs)
            found += (classes * theirs[known] + guesses[known]).bincount(minlength=classes * classes)
        if not found.any():
            raise DataError(
                f"data ({self.validation.split}): no pixel of the masks has a class ({IGNORED} counts nowhere). "
                f"Possible: masks with class indices. Check them."
            )
        return found.view(classes, classes)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens after each block, prefix included: mean over the validation images, rounded."""
        steps, shape = steps_of(self.model), shape_of(self.model)
        counts = [count.double().mean().item() for count in self.outputs.counts]
        fixed = [step.step.after for step in steps[: len(steps) - len(counts)]]
        _, _, tokens = cost_of_counts(shape, [step.step for step in steps], [*fixed, *counts])
        return tuple(round(count) for count in tokens)

    def batches(self, batch_size: int) -> list[Tensor]:
        """SPEED_BATCHES batches of validation images on the device, to measure speed and memory.

        They are real images, because with thresholds speed depends on what is in the picture.
        """
        indices = torch.arange(SPEED_BATCHES * batch_size) % len(self.validation)
        return [images for images, _ in self.validation.batches(indices.split(batch_size), self.device)]

    def time(self, batch_size: int) -> Timing:
        """Seconds of one forward pass."""
        return time_batches(self.model, self.batches(batch_size), self.settings.speed_seconds, self.amp)


def top1(subject: Subject) -> float:
    """Percent."""
    return _top(subject, 1)


def top5(subject: Subject) -> float:
    """Percent. Raises DataError with fewer than six classes, where it would always be 100."""
    return _top(subject, 5)


def loss(subject: Subject) -> float:
    """Cross entropy in nats, mean over images (or over all pixels that have a class), without label smoothing."""
    logits, labels, _ = subject.outputs
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels).item()
    total, pixels = 0.0, 0
    for some, masks in zip(logits.split(PIXEL_BATCH), labels.split(PIXEL_BATCH), strict=True):
        total += F.cross_entropy(resized(some, masks.shape[1:]), masks, ignore_index=IGNORED, reduction="sum").item()
        pixels += int((masks != IGNORED).sum())
    return total / max(pixels, 1)


def agreement(subject: Subject) -> float:
    """Percent. The dense model is the one before any fine-tuning, so a fine-tuned dense model can be below 100 too."""
    logits, labels, _ = subject.outputs
    dense = subject.dense_logits()
    if logits.ndim == 2:
        return 100 * (logits.argmax(dim=1) == dense.argmax(dim=1)).double().mean().item()
    parts = zip(*(all_.split(PIXEL_BATCH) for all_ in (logits, dense, labels)), strict=True)
    same = [(pixel_classes(ours, masks) == pixel_classes(theirs, masks)).double() for ours, theirs, masks in parts]
    return 100 * torch.cat(same).mean().item()


def miou(subject: Subject) -> float:
    """Percent. Over all validation pixels together; classes that are neither there nor guessed are left out."""
    right, found = subject.confusion.diagonal(), subject.confusion
    union = found.sum(dim=0) + found.sum(dim=1) - right
    return 100 * (right[union > 0].double() / union[union > 0]).mean().item()


def pixel_accuracy(subject: Subject) -> float:
    """Percent of the pixels that have a class."""
    return 100 * (subject.confusion.diagonal().sum() / subject.confusion.sum()).item()


def pixel_classes(logits_BKHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """The likeliest class of each pixel of masks, (B, height, width), from logits of patches."""
    return resized(logits_BKHW, masks_BHW.shape[1:]).argmax(dim=1)  # type: ignore[arg-type]  # two sizes


def feature_similarity(subject: Subject) -> float:
    """Percent. The dense model is the one before any fine-tuning."""
    return 100 * F.cosine_similarity(subject.outputs.logits, subject.dense_logits(), dim=1).double().mean().item()


def patch_similarity(subject: Subject) -> float:
    """Percent, mean over images and their patches. Raises ScheduleError where tokens are missing at the end."""
    model, dense = subject.model, build_model(subject.dense, subject.device)
    refuse_missing_places(model)
    found = []
    with reproducible(subject.device), torch.inference_mode():
        indices = torch.arange(len(subject.validation)).split(subject.settings.batch_size)
        for images, _ in subject.validation.batches(indices, subject.device):
            with autocast(subject.device, subject.amp):
                here, there = (patches_of(one, one.forward_features(images)).float() for one in (model, dense))  # type: ignore[operator]
            found.append(F.cosine_similarity(here, there, dim=-1).double().mean(dim=1).cpu())
    return 100 * torch.cat(found).mean().item()


def knn_top1(subject: Subject) -> float:
    """Percent. The training images vote with exp(cosine / 0.07), as in DINO (ICCV 2021, arXiv 2104.14294)."""
    features, labels, _ = subject.outputs
    known, their_labels, _ = predict(
        subject.model, subject.train, subject.settings.batch_size, subject.device, subject.amp
    )
    classes, right = int(torch.cat([labels, their_labels]).max()) + 1, 0
    known_TC = F.normalize(known, dim=1)
    for some, wanted in zip(features.split(KNN_BATCH), labels.split(KNN_BATCH), strict=True):
        cosine_BT = F.normalize(some, dim=1) @ known_TC.T
        cosine_BK, nearest_BK = cosine_BT.topk(min(NEIGHBOURS, len(known)), dim=1)
        votes_BC = torch.zeros(len(some), classes).scatter_add(1, their_labels[nearest_BK], (cosine_BK / 0.07).exp())
        right += int((votes_BC.argmax(dim=1) == wanted).sum())
    return 100 * right / len(labels)


def mean_gmacs(subject: Subject) -> Measured:
    """Mean of 10^9 multiply-accumulates over images. spread: half the interquartile range between images."""
    return _mean(subject.costs())


def mean_predicted_latency_ms(subject: Subject) -> Measured:
    """Mean over images of the time that the profile gives for a batch of such images."""
    return _mean(subject.costs(profile_of(subject.target)))


def _mean(costs: Tensor) -> Measured:
    low, high = costs.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return Measured(costs.mean().item(), (high - low) / 2)


def gmacs_p95(subject: Subject) -> float:
    """95th percentile over images of 10^9 multiply-accumulates."""
    return subject.costs().quantile(0.95).item()


def target_miss(subject: Subject) -> float:
    """Percent of the target, above or below."""
    target = target_of(subject.schedule, subject.target.profile)
    return 0.0 if target is None else 100 * abs(subject.costs(target.table).mean().item() / target.amount - 1)


def parameters(model: ModelConfig, schedule: Schedule) -> float:
    """Millions of parameters, with the learned parts of the schedule."""
    return (parameter_count(model) + learned_parameters(schedule, model_shape(model))) / 1e6


def latency_ms(subject: Subject) -> Measured:
    """Milliseconds, after warm-up, synchronised."""
    timing = subject.time(1)
    return Measured(1e3 * timing.median, 1e3 * timing.spread)


def throughput(subject: Subject) -> Measured:
    """Images per second at `measure.speed_batch_size`, after warm-up, synchronised."""
    batch_size = subject.settings.speed_batch_size
    timing = subject.time(batch_size)
    return Measured(batch_size / timing.median, (batch_size / timing.low - batch_size / timing.high) / 2)


def peak_memory_mb(subject: Subject) -> float:
    """10^6 bytes of weights, input and activations, at `measure.speed_batch_size`; see `speed.peak_memory`."""
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
