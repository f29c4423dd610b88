"""Logits of a model on a set of images, and the numerics that training and validation share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunesearch.errors import ModelError
from prunesearch.evaluate.images import ImageSet
from prunesearch.models import steps_of, trace


def half_precision(device: torch.device, amp: bool) -> torch.dtype | None:
    """What mixed precision computes in: on CUDA bfloat16, or float16 where the GPU has no bfloat16; else None."""
    if not amp or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def autocast(device: torch.device, amp: bool) -> AbstractContextManager[object]:
    """Mixed precision where there is any, else nothing."""
    dtype = half_precision(device, amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Have CUDA add in a fixed order, so that the same task gives the same numbers twice. CPUs do so anyway.

    Operators that cannot warn. Speed is measured outside of this, as deterministic kernels may be slower.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first call
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Predictions(NamedTuple):
    """Of N images, on the CPU: logits (N, classes) in float32, labels (N), and the patch tokens of each image after
    each step whose counts differ between images, (N) each."""

    logits: Tensor
    labels: Tensor
    counts: tuple[Tensor, ...]


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: ImageSet,
    batch_size: int,
    device: torch.device,
    amp: bool,
    flip: bool = False,
    indices: Tensor | None = None,
) -> Predictions:
    """Run a model on a set of images, or on those with these `indices`, in their order.

    Sets the model to evaluation mode. `flip` mirrors the images left to right. Training images that cannot be read and
    are not in memory are left out.
    """
    model.eval()
    indices = torch.arange(len(images)) if indices is None else indices
    traces = any(step.counts_differ for step in steps_of(model))
    logits, labels, counts = [], [], []
    with reproducible(device):
        for batch, their_labels in images.batches(indices.split(batch_size), device):
            if len(their_labels) == 0:  # none of these training images could be read
                continue
            batch = batch.flip(-1) if flip else batch
            with autocast(device, amp):
                if traces:
                    their_logits, _, _, their_counts = trace(model, batch)
                    counts.append([count_B.cpu() for count_B in their_counts])
                else:
                    their_logits = model(batch)
            if their_logits.ndim != 2 or len(their_logits) != len(batch):
                raise ModelError(
                    f"model: its output has the shape {tuple(their_logits.shape)} for {len(batch)} images; possible: "
                    f"(images, classes). Choose a model that pools its tokens and has a classifier."
                )
            logits.append(their_logits.float().cpu())
            labels.append(their_labels.cpu())
    return Predictions(torch.cat(logits), torch.cat(labels), tuple(map(torch.cat, zip(*counts, strict=True))))
