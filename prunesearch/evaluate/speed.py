"""Measure the time and memory of a forward pass in evaluation mode, under inference_mode, with AMP if asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunesearch.evaluate.predict import autocast

FEWEST_REPETITIONS = 5
WARM_UP_SHARE = 0.2
"""Duration of the warm-up as a share of the measuring time. It has at least two passes."""


class Timing(NamedTuple):
    """Seconds of one batch: median, first and third quartile."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the interquartile range."""
        return (self.high - self.low) / 2


@torch.inference_mode()
def time_batches(model: nn.Module, batches: Sequence[Tensor], seconds: float, amp: bool) -> Timing:
    """Time forward passes for `seconds` (at least FEWEST_REPETITIONS) after a warm-up. The batches are used in turn.

    Before and after each pass the device is synchronised.
    """
    model.eval()
    _repeat(model, batches, seconds * WARM_UP_SHARE, 2, amp)
    times = torch.tensor(_repeat(model, batches, seconds, FEWEST_REPETITIONS, amp), dtype=torch.float64)
    low, median, high = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Timing(median, low, high)


def _repeat(model: nn.Module, batches: Sequence[Tensor], seconds: float, at_least: int, amp: bool) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < end:
        images = batches[len(times) % len(batches)]
        synchronise(images.device)
        start = time.perf_counter()
        with autocast(images.device, amp):
            model(images)
        synchronise(images.device)
        times.append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def peak_memory(model: nn.Module, images: Tensor, amp: bool) -> int:
    """Bytes of the weights, the input batch (B, C, H, W), and the most that one forward pass allocates besides them.

    On CUDA it is the allocator's peak minus what was allocated before the pass. On other devices it is the largest sum
    of living tensors that operators returned; scratch memory inside an operator is not seen.
    """
    model.eval()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    device = images.device
    if device.type == "cuda":
        with autocast(device, amp):
            model(images)  # libraries allocate their workspaces at the first call
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with autocast(device, amp):
            model(images)
        synchronise(device)
        return weights + images.nbytes + torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors(known=(*model.parameters(), *model.buffers(), images)) as live:
        model(images)
    return weights + images.nbytes + live.peak


class _LiveTensors(TorchDispatchMode):
    """Sums the storages that operators return for as long as they live. peak: the largest sum, in bytes.

    Views of `known` tensors are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def synchronise(device: torch.device) -> None:
    """Return when the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
