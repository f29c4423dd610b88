"""Train a head that gives classes to each patch on the dense model, whose other weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunesearch.config import Budget, DataConfig, FinetuneConfig, MeasureConfig, ModelConfig, Target
from prunesearch.errors import ModelError, RunError
from prunesearch.evaluate.build import build_with_fresh_head
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.finetune import Batch, LossNotFinite, Progress, pixel_loss, take_steps
from prunesearch.evaluate.machine import find_device
from prunesearch.evaluate.measures import Subject, miou, pixel_accuracy
from prunesearch.evaluate.predict import autocast, predict, reproducible
from prunesearch.models.dense_head import DenseHead
from prunesearch.schedule import Schedule

IMAGES, LEARNING_RATE, BATCH_SIZE = 20_000, 1e-3, 32


@dataclass(frozen=True)
class TrainedHead:
    """The dense model with its trained head, and percent on the validation pictures."""

    model: nn.Module
    miou: float
    pixel_accuracy: float
    validation_images: int


def train_head(
    model: ModelConfig,
    data: DataConfig,
    *,
    images: int = IMAGES,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    device: str = "auto",
    report: Callable[[int, float], None] = lambda done, loss: None,
) -> TrainedHead:
    """Train `model.head` from random weights with the cross entropy of the pixels, for `images` pictures.

    The other weights are those that the model has without the head. report: called with pictures seen and the loss.
    Raises ModelError for a model without a head in its section, DataError for data without masks, ResourceError for an
    unknown device, RunError when the loss is not finite.
    """
    if model.head is None:
        raise ModelError(
            f"model.head: absent, so {model.name} has no head to train. Possible: linear or conv, with num_classes. "
            f"Write it under model, or --set model.head=linear."
        )
    place = find_device(device)
    dense: Any = build_with_fresh_head(model)
    torch.manual_seed(seed)
    dense.to(place)
    train, held_out = open_data(data, dense)
    head, amp = _HeadAlone(dense.head), True
    settings = FinetuneConfig(
        learning_rate=learning_rate,
        weight_decay=1e-4,
        batch_size=batch_size,
        warmup=0.05 if images > 20 * batch_size else 0.0,  # the first step of a warm-up learns nothing
        distill=False,
    )
    progress, budget = Progress(), Budget(images=images)

    def losses(batch: Batch) -> Iterator[Tensor]:
        with autocast(place, amp):
            with torch.no_grad():
                tokens_BNC = dense.forward_features(batch.images)
            logits = dense.forward_head(tokens_BNC)
        loss = pixel_loss(logits.float(), batch.labels)
        report(progress.images + len(batch.labels), loss.item())
        yield loss

    try:
        with reproducible(place):
            take_steps(
                head, train, budget, settings, None, place, seed, progress, losses, lambda: progress.images / images
            )
    except LossNotFinite as error:
        raise RunError(f"train-head: {error}. Possible: a lower learning rate. Lower --learning-rate.") from None
    subject = Subject(
        dense,
        Target(model),
        Schedule(),
        held_out,
        MeasureConfig(),
        place,
        amp,
        lambda: predict(dense, held_out, MeasureConfig().batch_size, place, amp).logits,
        model,
        train,
    )
    return TrainedHead(dense, miou(subject), pixel_accuracy(subject), len(held_out))


class _HeadAlone(nn.Module):
    """The head as a model of its own, so that only it is trained."""

    def __init__(self, head: DenseHead) -> None:
        super().__init__()
        self.head = head
