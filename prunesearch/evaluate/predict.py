"""Logits of a model on a set of images; mixed precision and determinism for training and validation."""

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
from prunesearch.models.dense_head import segments


def half_precision(device: torch.device, amp: bool) -> torch.dtype | None:
    """The dtype of mixed precision: on CUDA bfloat16, or float16 if the GPU has no bfloat16; else None."""
    if not amp or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def autocast(device: torch.device, amp: bool) -> AbstractContextManager[object]:
    """A context with mixed precision, if `half_precision` gives a dtype."""
    dtype = half_precision(device, amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Make CUDA add in a fixed order, so that the same task gives the same numbers again. CPUs do so anyway.

    Operators that have no deterministic kernel warn. Speed is measured outside of this context, because deterministic
    kernels may be slower.
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
    """Output for N images, on the CPU: logits (N, classes) in float32, and labels (N).

    For segmentation logits are those of patches, (N, classes, rows, columns), and labels masks, (N, height, width).
    counts: patch tokens of each image, (N) each, after each step whose counts differ between images.
    """

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
    """Run a model, in evaluation mode, on all images of a set, or on those with `indices`, in this order.

    flip: mirror the images left to right. Training images that are decoded each time and cannot be read are left out.
    """
    model.eval()
    indices = torch.arange(len(images)) if indices is None else indices
    wanted = ("classes", "rows", "columns") if segments(model) else ("classes",)
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
            if their_logits.ndim != 1 + len(wanted) or len(their_logits) != len(batch):
                raise ModelError(
                    f"model: its output has the shape {tuple(their_logits.shape)} for {len(batch)} images; possible: "
                    f"(images, {', '.join(wanted)}). Choose a model that pools its tokens and has a classifier."
                )
            logits.append(their_logits.float().cpu())
            labels.append(their_labels.cpu())
    return Predictions(torch.cat(logits), torch.cat(labels), tuple(map(torch.cat, zip(*counts, strict=True))))
