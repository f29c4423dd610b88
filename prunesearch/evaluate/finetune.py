"""Train a model for exactly its budget: AdamW, cosine learning rate, distillation from the dense model."""

from __future__ import annotations

import io
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.config import Budget, FinetuneConfig
from prunesearch.errors import UserError
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.predict import autocast, half_precision
from prunesearch.evaluate.schedule_loss import ScheduleLoss, distills_patches, distills_tokens, learns_decisions
from prunesearch.files import write_atomically
from prunesearch.models import (
    PARTS,
    patches_of,
    schedule_of,
    shape_of,
    steps_of,
    threshold_of,
    threshold_unit,
    trace,
)
from prunesearch.models.dense_head import IGNORED, resized
from prunesearch.models.weights import weights_of, write_weights
from prunesearch.profile import Profile


class DenseOutput(NamedTuple):
    """Output of the dense model for a batch: logits (B, classes) or (B, classes, rows, columns), and the final
    normalised
    patch tokens or None."""

    logits: Tensor
    patches_BnC: Tensor | None = None


Teacher = Callable[[Tensor, Tensor, Tensor], DenseOutput]
"""(images (B, C, H, W) as the student sees them, indices (B), mirrored (B, bool)) -> output of the dense model."""


class Batch(NamedTuple):
    """Input of a training step: images (B, C, H, W) as the student sees them, labels (B), and the dense model's output.

    dense: None without distillation.
    """

    images: Tensor
    labels: Tensor
    dense: DenseOutput | None

    @property
    def target(self) -> Tensor | None:
        """Logits of the dense model, (B, classes); None without distillation."""
        return None if self.dense is None else self.dense.logits


logger = logging.getLogger(__name__)

SCHEDULE_UNITS = 10_000  # timm's scheduler counts updates; the budget is this many of them


class LossNotFinite(Exception):
    """The training loss became NaN or infinite."""


@dataclass
class Progress:
    """How much of a budget is spent, and the optimiser's moments, with which a larger budget continues."""

    images: int = 0
    seconds: float = 0.0
    moments: dict[str, Any] | None = None


def finetune(
    model: nn.Module,
    train: ImageSet,
    budget: Budget,
    config: FinetuneConfig,
    teacher: Teacher | None,
    device: torch.device,
    seed: int,
    progress: Progress,
    profile: Profile | None = None,
) -> None:
    """Train `model` in place until `progress` has reached `budget`. Images and seconds of earlier calls count.

    A continued training goes on with the order of images and the optimiser's moments. Its learning rate goes through a
    whole cosine over the rest of the budget. The last batch is cut so that exactly `budget.images` images are seen;
    unreadable images count. When nothing learns (freeze_backbone: 1 and a schedule without learned parts), the model
    does not change and no image is read. Raises LossNotFinite, and DataError when too many images cannot be read.

    profile: of the device, for a schedule whose target is in milliseconds; without it that raises DeviceError.
    """
    if budget.images is None and budget.seconds is None:
        raise UserError(
            "budget: neither images nor seconds given. Possible: either or both. For no training: images: 0."
        )
    if is_spent(budget, progress):
        return
    if not parameter_groups(model, config):
        logger.info("nothing learns with this schedule and freeze_backbone: 1; the model stays as it is")
        return
    schedule_loss = ScheduleLoss(model, config, profile) if learns_decisions(model) else None
    compares_tokens, compares_patches = distills_tokens(model, config), distills_patches(model, config)
    features, earlier = shape_of(model).gives_features, replace(progress)

    def losses(batch: Batch) -> Iterator[Tensor]:
        dense_patches_BnC = None if batch.dense is None else batch.dense.patches_BnC
        with autocast(device, config.amp):
            if schedule_loss is not None:
                outcome = trace(model, batch.images)
                logits, patches_BnC = outcome.logits, outcome.patches_BnC
            elif compares_patches:
                tokens_BNC = model.forward_features(batch.images)  # type: ignore[operator]
                logits, patches_BnC = model.forward_head(tokens_BNC), patches_of(model, tokens_BNC)  # type: ignore[operator]
            else:
                logits = model(batch.images)
        loss = distillation_loss(logits.float(), batch.labels, batch.target, config, features)
        if schedule_loss is not None:
            loss = loss + schedule_loss(outcome, dense_patches_BnC if compares_tokens else None)
        if compares_patches and dense_patches_BnC is not None:
            loss = loss + config.distill_patches_weight * feature_distance(patches_BnC, dense_patches_BnC, config)
        yield loss

    def share() -> float:
        return _share(budget, progress, earlier)

    take_steps(model, train, budget, config, teacher, device, seed, progress, losses, share)


def take_steps(
    model: nn.Module,
    train: ImageSet,
    budget: Budget,
    config: FinetuneConfig,
    teacher: Teacher | None,
    device: torch.device,
    seed: int,
    progress: Progress,
    losses: Callable[[Batch], Iterable[Tensor]],
    share: Callable[[], float],
) -> None:
    """Train `model` in place until `progress` has reached `budget`. Updates `progress`.

    losses: the losses of a batch, whose gradients add up to one step. Each is differentiated before the next one is
    computed, so that only one graph is in memory. share: progress of the learning rate schedule, 0 to 1.
    Raises LossNotFinite.
    """
    groups = parameter_groups(model, config)
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=config.learning_rate, weight_decay=config.weight_decay)
    if progress.moments is not None:
        optimizer.load_state_dict({"state": progress.moments, "param_groups": optimizer.state_dict()["param_groups"]})
    warmup = min(round(config.warmup * SCHEDULE_UNITS), SCHEDULE_UNITS - 1)
    schedule = CosineLRScheduler(
        optimizer, t_initial=SCHEDULE_UNITS - warmup, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    scaler = torch.amp.GradScaler(device.type, enabled=half_precision(device, config.amp) is torch.float16)
    mirror = torch.Generator().manual_seed((seed + progress.images) % 2**63)
    mirror_share = 0.5 if config.augment == "flip" else 0.0
    before, start = progress.seconds, time.perf_counter()
    model.train()
    order = training_order(len(train), config.batch_size, seed, progress.images, budget.images)
    announced, to_read = itertools.tee(order)  # the loader reads ahead of the steps
    for indices, (images, labels) in zip(announced, train.batches(to_read, device), strict=False):
        if len(labels) == 0:  # none of them could be read
            progress.images += len(indices)
            continue
        now = share()
        schedule.step_update(round(SCHEDULE_UNITS * now))
        if now < config.freeze_backbone:
            for group in optimizer.param_groups:
                group["lr"] *= group["part"] != "backbone"
        mirrored = torch.rand(len(indices), generator=mirror)[: len(labels)] < mirror_share
        if mirrored.any():
            images = torch.where(mirrored.to(device).view(-1, 1, 1, 1), images.flip(-1), images)
            if labels.ndim == 3:
                labels = torch.where(mirrored.to(device).view(-1, 1, 1), labels.flip(-1), labels)
        optimizer.zero_grad()
        for loss in losses(Batch(images, labels, None if teacher is None else teacher(images, indices, mirrored))):
            if not math.isfinite(loss.item()):
                raise LossNotFinite(f"the training loss became {loss.item()} after {progress.images} images")
            scaler.scale(loss).backward()
        if config.clip_grad is not None:
            scaler.unscale_(optimizer)
            for part in ("backbone", "learned"):  # thresholds: other scale, AdamW bounds their step
                clipped = [p for group in optimizer.param_groups if group["part"] == part for p in group["params"]]
                nn.utils.clip_grad_norm_(clipped, config.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        progress.images += len(indices)
        progress.seconds = before + time.perf_counter() - start
        if is_spent(budget, progress):
            break
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise LossNotFinite(f"a parameter is not finite after the last step, at {progress.images} images")
    progress.moments = optimizer.state_dict()["state"]
    model.eval()


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Parameter groups of the optimiser: the model's own, the schedule's learned parts, and thresholds.

    There is no weight decay for biases, norms, thresholds, and the parameters of timm's no_weight_decay. Frozen
    parameters are left out, and their requires_grad is set to False: thresholds without a target, and with
    freeze_backbone: 1 the model's own parameters.
    """
    schedule = schedule_of(model)
    moves = schedule is not None and schedule.target is not None
    thresholds = {
        id(parameter): config.threshold_learning_rate * threshold_unit(step.stage, shape_of(model))
        for step in steps_of(model)
        if (parameter := threshold_of(model, step)) is not None
    }
    undecayed: set[str] = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") or name in undecayed else config.weight_decay
        if id(parameter) in thresholds:
            parameter.requires_grad_(moves)
            key = ("threshold", thresholds[id(parameter)], 0.0)
        elif name.startswith(f"{PARTS}."):
            key = ("learned", config.learned_learning_rate, decay)
        else:
            parameter.requires_grad_(config.freeze_backbone < 1)
            key = ("backbone", config.learning_rate, decay)
        if parameter.requires_grad:
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "part": part, "lr": rate, "weight_decay": decay}
        for (part, rate, decay), parameters in groups.items()
    ]


def is_spent(budget: Budget, progress: Progress) -> bool:
    """Whether the first bound of the budget is reached."""
    images_done = budget.images is not None and progress.images >= budget.images
    return images_done or (budget.seconds is not None and progress.seconds >= budget.seconds)


def _share(budget: Budget, progress: Progress, earlier: Progress) -> float:
    """The share, 0 to 1, of the budget that was left after `earlier` and is spent now, for the bound that is closer."""
    shares = []
    if budget.images is not None:
        shares.append((progress.images - earlier.images) / (budget.images - earlier.images))
    if budget.seconds is not None:
        shares.append((progress.seconds - earlier.seconds) / (budget.seconds - earlier.seconds))
    return max(shares)


def training_order(count: int, batch_size: int, seed: int, first: int, last: int | None) -> Iterator[Tensor]:
    """Batches of indices from shuffled epochs, from the `first`-th image to the `last`-th (without end when None).

    The order depends on the seed only, so a continued training goes on where it stopped.
    """
    seen = first
    while last is None or seen < last:
        end = seen + batch_size if last is None else min(seen + batch_size, last)
        epochs = range(seen // count, (end - 1) // count + 1)
        shuffled = torch.cat([_shuffled(count, seed, epoch) for epoch in epochs])
        begin = seen - epochs[0] * count
        yield shuffled[begin : begin + end - seen]
        seen = end


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def distillation_loss(
    logits: Tensor, labels: Tensor, target: Tensor | None, config: FinetuneConfig, features: bool = False
) -> Tensor:
    """Cross entropy plus temperature^2 x KL(dense || pruned) of the softened classes (Hinton et al. 2015), weighted.

    Logits of patches are resized to the pixels of masks for the cross entropy, and compared patch by patch. target:
    logits of the dense model; None for the cross entropy alone. features: the model has no classifier, so both
    are features, and the loss is their distance.
    """
    if features:
        if target is None:
            return logits.sum() * 0.0
        return config.distill_weight * feature_distance(logits, target.to(logits.device), config)
    if logits.ndim == 4 and target is not None:  # every patch counts as an image
        patches, target = by_patch(logits), by_patch(target)
    else:
        patches = logits
    weight = config.cross_entropy_weight
    if weight == 0 and target is not None:  # pictures without classes have no label to read
        return config.distill_weight * _divergence(patches, target, config)
    if weight is None:
        weight = 1.0 if target is None else 1 - config.distill_weight
    if logits.ndim == 4:
        hard = pixel_loss(logits, labels, config.label_smoothing)
    else:
        hard = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    if target is None:
        return weight * hard
    return weight * hard + config.distill_weight * _divergence(patches, target, config)


def pixel_loss(logits_BKHW: Tensor, masks_BHW: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of pixels, mean over those that have a class; 0 where none has."""
    pixels = resized(logits_BKHW, masks_BHW.shape[1:])  # type: ignore[arg-type]  # two sizes
    total = F.cross_entropy(pixels, masks_BHW, label_smoothing=label_smoothing, ignore_index=IGNORED, reduction="sum")
    return total / (masks_BHW != IGNORED).sum().clamp_min(1)


def by_patch(logits_BKHW: Tensor) -> Tensor:
    """Logits of patches as a list, (patches of all images, classes)."""
    return logits_BKHW.permute(0, 2, 3, 1).flatten(0, 2)


def _divergence(logits: Tensor, target: Tensor, config: FinetuneConfig) -> Tensor:
    student, dense = ((x / config.temperature).log_softmax(dim=1) for x in (logits, target.to(logits.device)))
    return F.kl_div(student, dense, reduction="batchmean", log_target=True) * config.temperature**2


def feature_distance(features: Tensor, dense: Tensor, config: FinetuneConfig) -> Tensor:
    """Distance of features (..., C) from those of the dense model, mean over all of them."""
    features, dense = features.float(), dense.float()
    if config.distill_features_loss == "squared":
        return F.mse_loss(features, dense)
    return (1 - F.cosine_similarity(features, dense, dim=-1)).mean()


def save_checkpoint(path: str, model: nn.Module, progress: Progress) -> None:
    """Write `<path>.safetensors` (weights) and `<path>.state` (progress), each atomically."""
    write_weights(f"{path}.safetensors", weights_of(model))
    buffer = io.BytesIO()
    torch.save(vars(progress), buffer)
    write_atomically(f"{path}.state", buffer.getvalue())


def load_checkpoint(path: str, model: nn.Module) -> Progress:
    """Load what `save_checkpoint` wrote into `model`, and return its progress. Raises UserError if it is missing."""
    for suffix in (".safetensors", ".state"):
        if not Path(path + suffix).is_file():
            raise UserError(
                f"resume_from: there is no file {path + suffix!r}. Possible: a checkpoint that an earlier, smaller "
                f"budget saved. Check the path, or train from the start without resume_from."
            )
    model.load_state_dict(safetensors.torch.load_file(f"{path}.safetensors"))
    return Progress(**torch.load(f"{path}.state", map_location="cpu", weights_only=True))
