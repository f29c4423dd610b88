"""Time many pieces of work in turns, so that drift of the machine and its neighbours hit all of them alike."""

from __future__ import annotations

import ctypes
import math
import random
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)

VISITS = (0.002, 0.04)
"""Seconds of a visit to a short piece, at least and at most: it is repeated for so long. Longer is fairer, as other
work on the machine then slows all pieces alike; shorter gives more rounds."""
ROUNDS = 25
"""Visits are so short that about so many rounds fit in the time."""
FEWEST_ROUNDS = 5
LONG = 0.5
"""What takes longer than this many seconds is visited in the first FEWEST_ROUNDS rounds only."""
WARM = 0.25
"""What takes longer than this many seconds is not run once more before a visit: caches fill in a small part of it."""
ENOUGH_ERROR = 0.005
"""Measuring ends early when the standard error of every piece is below this share of its time."""
QUIET = 0.25
"""A piece takes what it took in this share of its visits, the fastest ones: noise only adds time."""
SWEEPS = 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt."""


@dataclass(frozen=True)
class Measured:
    """Seconds of one piece of work when the machine is quiet, and the standard error as a share of it."""

    seconds: float
    error: float


class Ratio(NamedTuple):
    """How many times as fast as the work that it is compared with: median, first and third quartile over rounds.

    seconds: of this piece, median over rounds. rounds: how many.
    """

    median: float
    low: float
    high: float
    seconds: float
    rounds: int


def in_turns(
    work: Mapping[Key, Callable[[], object]],
    seconds: float,
    wait: Callable[[], None] = lambda: None,
    seed: int = 0,
    long: float = LONG,
    clock: Callable[[], float] | None = None,
) -> dict[Key, Measured]:
    """Measure every piece of work once in each round, in random order, until `seconds` are over or all are certain.

    work: the pieces by name; each is called without arguments. wait: returns when the device has finished; called
    before and after each visit. clock: for work of this thread alone `time.thread_time`, which stands still while
    something else has the processor. At least FEWEST_ROUNDS rounds are made, however long they take; later rounds leave
    out what takes longer than `long` seconds.
    """
    rounds = _rounds(
        {name: (run,) for name, run in work.items()}, seconds, wait, seed, long, clock or time.perf_counter
    )
    values, errors = _estimates(rounds)
    return {name: Measured(value, error) for name, value, error in zip(work, values, errors, strict=True)}


def ratios_in_turns(
    work: Mapping[Key, Sequence[Callable[[], object]]],
    base: Key,
    seconds: float,
    wait: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[Key, Ratio]:
    """How many times as fast as the piece `base` every piece of work is, itself included.

    Pieces of one round are compared with each other only, so that drift of the machine divides out. Rounds, times and
    the end are those of `in_turns`, but long pieces are in every round too.

    work: for each piece its calls, as many for all. A round makes one of them: the first round the first one, and so
    on. The same place must hold the same input for all pieces.
    """
    times_RP = np.asarray(_rounds(work, seconds, wait, seed, math.inf, time.perf_counter))
    names = list(work)
    ratio_RP = times_RP[:, [names.index(base)]] / times_RP
    low_P, median_P, high_P = np.quantile(ratio_RP, [0.25, 0.5, 0.75], axis=0).tolist()
    columns = zip(median_P, low_P, high_P, np.median(times_RP, axis=0).tolist(), strict=True)
    return {name: Ratio(*column, len(times_RP)) for name, column in zip(names, columns, strict=True)}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, this process keeps the memory that it frees. Only glibc needs it; elsewhere nothing happens.

    glibc returns large blocks to the system and takes them again, page by page. That is up to a tenth of a pass, in one
    process and not in the next, more for the dense model than for a pruned one: it cannot be predicted. Afterwards the
    limits are those that glibc itself comes to in a process with large blocks.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 65_536)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)  # type: ignore[union-attr]


@freed_memory_kept()
def _rounds(
    work: Mapping[Key, Sequence[Callable[[], object]]],
    seconds: float,
    wait: Callable[[], None],
    seed: int,
    long: float,
    clock: Callable[[], float],
) -> list[list[float]]:
    """Seconds of every piece in each round; NaN where it was not visited, see `LONG`."""
    names, order = list(work), random.Random(seed)
    single = {name: _single(work[name][0], wait, clock) for name in names}
    visit = min(max(seconds / (ROUNDS * len(names)), VISITS[0]), VISITS[1])
    repeats = {name: max(1, round(visit / single[name])) for name in names}
    end = time.perf_counter() + seconds
    rounds: list[list[float]] = []
    while len(rounds) < FEWEST_ROUNDS or time.perf_counter() < end:
        now = [name for name in names if len(rounds) < FEWEST_ROUNDS or single[name] < long]
        if not now:
            break
        seen = dict.fromkeys(names, np.nan)
        for name in order.sample(now, len(now)):
            runs = work[name]
            seen[name] = _visit(runs[len(rounds) % len(runs)], repeats[name], wait, clock, warms_up=single[name] < WARM)
        rounds.append([seen[name] for name in names])
        if len(rounds) >= FEWEST_ROUNDS and max(_estimates(rounds)[1]) < ENOUGH_ERROR:
            break
    return rounds


def _single(run: Callable[[], object], wait: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of one call. The first call warms up and does not count."""
    run()
    first = _visit(run, 1, wait, clock, warms_up=False)
    return max(first if first > LONG else min(first, *(_visit(run, 1, wait, clock) for _ in range(2))), 1e-7)


def _visit(
    run: Callable[[], object],
    repeats: int,
    wait: Callable[[], None],
    clock: Callable[[], float],
    warms_up: bool = True,
) -> float:
    if warms_up:
        run()  # a piece shall not pay for caches and memory that the one before it has filled
    wait()
    start = clock()
    for _ in range(repeats):
        run()
    wait()
    return (clock() - start) / repeats


def _estimates(rounds: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Seconds of each piece when the machine is quiet, and their standard errors as shares.

    log(time) = piece + round + noise, fitted by median polish: what slows a whole round down belongs to the round.
    """
    log_RP = np.log(np.asarray(rounds))
    piece_P, round_R = np.zeros(log_RP.shape[1]), np.zeros(log_RP.shape[0])
    for _ in range(SWEEPS):
        piece_P = np.nanmedian(log_RP - round_R[:, None], axis=0)
        round_R = np.nanmedian(log_RP - piece_P, axis=1)
    own_RP = log_RP - round_R[:, None]
    low, fast, high = np.nanquantile(own_RP, [0.25, QUIET, 0.75], axis=0)
    visits_P = np.sum(~np.isnan(log_RP), axis=0)
    # standard error of a median of normal noise: 1.253 sigma / sqrt(n), with sigma = IQR / 1.349
    error_P = 1.253 / 1.349 * (high - low) / np.sqrt(visits_P)
    return np.exp(fast + np.quantile(round_R, QUIET)).tolist(), error_P.tolist()
