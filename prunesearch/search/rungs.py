"""Successive halving by Pareto rank: which candidate is promoted to the next budget. Pure functions over results.

Asynchronous, promotion-type (ASHA, Li et al. 2020): when a worker is free, the best candidate that qualifies is
promoted; when there is none, a new one starts at the first rung. Candidates are ordered by how much they break the
limits, then by non-dominated rank, then by spread along their front (epsilon-net, as in MO-ASHA, Schmucker et al.
2021). The net extends the points that were already promoted: a net built anew after each result would pick different
points each time and in the end promote all of them. The same results give the same decision; ties are broken by uid.

Objectives are losses here: all of them are minimized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prunesearch.front import nondominated_ranks

BANDS = 3
"""The range of costs is split into this many parts. At least one candidate of each part is promoted."""


@dataclass(frozen=True)
class Result:
    """A complete evaluation of a candidate at a rung.

    losses: objectives, minimized. excess: by how much all limits together are broken; 0 is within them. is_start: a
    start schedule, which is always promoted. is_promoted: it was already promoted, even if it failed there.
    """

    uid: str
    rung: int
    losses: tuple[float, ...]
    excess: float = 0.0
    is_start: bool = False
    is_promoted: bool = False


def promotion(results: Sequence[Result], one_in: int, cost: int | None) -> Result | None:
    """The result of one rung that is promoted now, or None.

    Start schedules are promoted at once. Others are promoted when the rung has 2 * one_in results: first the best
    1/one_in of them, then the best one within the limits from each third of the range of costs that has no promoted
    result yet (start schedules count). Results with a loss that is not finite are ignored.

    cost: column of the losses that holds the cost; None: no promotion by cost.
    """
    finished = sorted((one for one in results if all(map(math.isfinite, one.losses))), key=lambda one: one.uid)
    for result in finished:
        if result.is_start and not result.is_promoted:
            return result
    if len(finished) < 2 * one_in:
        return None
    places = len(finished) // one_in
    for layer in _layers(finished):
        places -= sum(result.is_promoted for result in layer)
        if places <= 0:
            break
        if not all(result.is_promoted for result in layer):
            return _most_distant(layer)
    return None if cost is None else _from_band_without_promotion(finished, cost)


def _from_band_without_promotion(finished: list[Result], cost: int) -> Result | None:
    within = [result for result in finished if result.excess <= 0]
    bands = bands_of([result.losses[cost] for result in within])
    for band in range(BANDS):
        members = [result for result, its in zip(within, bands, strict=True) if its == band]
        if members and not any(result.is_promoted for result in members):
            return _most_distant(next(_layers(members)))
    return None


def bands_of(costs: Sequence[float]) -> list[int]:
    """For each cost, the third of the range of costs in which it lies; 0 is the cheapest."""
    if not costs:
        return []
    low, extent = min(costs), max(costs) - min(costs)
    return [min(int(BANDS * (cost - low) / extent), BANDS - 1) if extent > 0 else 0 for cost in costs]


def _layers(results: list[Result]) -> Iterator[list[Result]]:
    """The results in groups, best first: ordered by excess, and for equal excess by non-dominated rank."""
    for excess in sorted({max(result.excess, 0.0) for result in results}):
        alike = [result for result in results if max(result.excess, 0.0) == excess]
        ranks = nondominated_ranks(np.array([result.losses for result in alike], dtype=np.float64))
        for rank in range(max(ranks) + 1):
            yield [alike[index] for index in np.flatnonzero(ranks == rank)]


def _most_distant(front: list[Result]) -> Result:
    losses = np.array([result.losses for result in front], dtype=np.float64)
    return front[next_of_net(losses, np.array([result.is_promoted for result in front]))]


def next_of_net(losses: np.ndarray, taken: np.ndarray) -> int:
    """Index of the point of a front that is farthest from all taken points, with each loss scaled to [0, 1].

    When none is taken: the best compromise (the smallest sum of scaled losses). Ties go to the lower index.

    losses: (n, objectives), of one front. taken: (n,) bool.
    """
    extent = np.ptp(losses, axis=0)
    scaled = (losses - losses.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    if not taken.any():
        return int(np.argmin(np.round(scaled.sum(axis=1), 9)))
    distances = np.square(scaled[:, None] - scaled[taken][None]).sum(axis=2).min(axis=1)
    return int(np.argmax(np.where(taken, -1.0, np.round(distances, 9))))
