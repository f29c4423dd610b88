"""Check an exported file against PyTorch, time it beside the dense model, and measure its accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prunesearch.device.timing import ratios_in_turns
from prunesearch.errors import ModelError, RunError
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.measures import pixel_classes
from prunesearch.export.runtimes import Run
from prunesearch.models.dense_head import IGNORED, segments

CHECK_BATCH = 32
SAME = 0.99
"""Share of the patches of an image whose classes must be the same, so that the image counts as the same."""


class Bounds(NamedTuple):
    """How far the logits of an image may be from PyTorch's, as shares of the largest logit.

    usual: for three images in four. largest: for every image. It is much wider: when the scores of two tokens are equal
    up to rounding, the other one may go.
    """

    usual: float
    largest: float


BOUNDS = {False: Bounds(1e-4, 0.3), True: Bounds(0.1, 1.0)}
"""By whether the file is fp16. In fp16 many scores are equal up to rounding."""


class Check(NamedTuple):
    """Logits of a file against those of PyTorch in float32.

    images: how many were compared. same: how many have the same arg max; of logits of patches: in SAME of them. usual:
    three images in four differ by at most this. largest: every image does. scale: PyTorch's largest logit, without its
    sign.
    """

    images: int
    same: int
    usual: float
    largest: float
    scale: float


class SpeedRatio(NamedTuple):
    """How many times as fast as the dense model: median, first and third quartile of rounds.

    dense, pruned: seconds of a batch, medians. batch_size: images in it.
    """

    median: float
    low: float
    high: float
    dense: float
    pruned: float
    batch_size: int


@torch.inference_mode()
def compare(model: nn.Module, run: Run, images_BCHW: Tensor) -> Check:
    """Compare a file with its model, which is on the CPU and in eval mode.

    The first image is a batch of its own, the others are in larger ones. Raises ModelError for a model whose output is
    not (images, classes), RunError when the runtime fails.
    """
    expected, found = [], []
    for batch in (images_BCHW[:1], *images_BCHW[1:].split(CHECK_BATCH)):
        if len(batch) == 0:
            continue
        logits_BK = model(batch)
        if logits_BK.ndim != 2 and not segments(model):
            raise ModelError(
                f"model: its output has the shape {tuple(logits_BK.shape)} for {len(batch)} images. Possible: (images, "
                f"classes). Choose a model that pools its tokens."
            )
        expected.append(logits_BK.float())
        try:
            found.append(torch.from_numpy(run(batch.numpy())))
        except Exception as error:  # a runtime raises anything
            raise RunError(f"export: the file cannot be run on {len(batch)} images: {error}") from error
    expected_BK, found_BK = torch.cat(expected), torch.cat(found)
    difference_B = (expected_BK - found_BK).abs().flatten(1).amax(dim=1)
    same_Bn = (expected_BK.argmax(dim=1) == found_BK.argmax(dim=1)).view(len(images_BCHW), -1)
    return Check(
        images=len(images_BCHW),
        same=int((same_Bn.double().mean(dim=1) >= SAME).sum()),
        usual=difference_B.quantile(0.75).item(),
        largest=difference_B.max().item(),
        scale=expected_BK.abs().max().item(),
    )


def refuse_difference(check: Check, half: bool, what: str) -> None:
    """Raise RunError when logits are farther from PyTorch's than `BOUNDS` allow. what: file and runtime."""
    bounds = BOUNDS[half]
    usual, largest = bounds.usual * check.scale, bounds.largest * check.scale
    if check.usual <= usual and check.largest <= largest:  # NaN is not
        return
    raise RunError(
        f"{what}: its logits differ from PyTorch's by up to {check.usual:.3g} for three images in four, and by up to "
        f"{check.largest:.3g} for all; {check.same} of {check.images} have the same arg max. Possible: {usual:.3g} and "
        f"{largest:.3g}, as the largest logit is {check.scale:.3g}. No file was kept. "
        f"{'Leave out half (--half), or report' if half else 'Report'} this with the schedule."
    )


def time_side_by_side(dense: Run, pruned: Run, batches: Sequence[np.ndarray], seconds: float) -> SpeedRatio:
    """Time both files in turns, as `ratios_in_turns` says. batches: (B, C, H, W) each, used in turn."""
    work = {
        is_dense: [partial(run, images) for images in batches] for is_dense, run in ((True, dense), (False, pruned))
    }
    found = ratios_in_turns(work, True, seconds)
    ratio = found[False]
    return SpeedRatio(ratio.median, ratio.low, ratio.high, found[True].seconds, ratio.seconds, len(batches[0]))


def pixel_accuracy(run: Run, images: ImageSet, batch_size: int) -> float:
    """Percent of the pixels of a set whose class a file says as the masks do."""
    right = pixels = 0
    for batch, masks in images.batches(torch.arange(len(images)).split(batch_size), torch.device("cpu")):
        known = masks != IGNORED
        guesses = pixel_classes(torch.from_numpy(run(batch.numpy())), masks)
        right, pixels = right + int((guesses == masks)[known].sum()), pixels + int(known.sum())
    return 100 * right / max(pixels, 1)


def top1(run: Run, images: ImageSet, batch_size: int) -> float:
    """Percent of all images of a set that a file classifies as their label says."""
    right = 0
    for batch, labels in images.batches(torch.arange(len(images)).split(batch_size), torch.device("cpu")):
        right += int((run(batch.numpy()).argmax(axis=1) == labels.numpy()).sum())
    return 100 * right / len(images)
