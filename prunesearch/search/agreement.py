"""Does a small budget tell what a large one will say? Rank correlation between neighbouring rungs, as far as known.

Only candidates that went on have both results, and they are the better part, so these numbers err on the low side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunesearch.config import Objective
from prunesearch.evaluate import METRICS
from prunesearch.record import Record, cost_of
from prunesearch.search.rungs import BANDS, bands_of

FEWEST = 3
"""Pairs of results below which there is no correlation to speak of."""
ENOUGH = 8
"""Pairs of results from which a low correlation is worth a warning."""
LOW = 0.5


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b of one objective between `rung` and the next one, over `pairs` candidates that have both.

    bands: the same within each third of the range of costs, cheapest first; None where too few have both. The overall
    tau flatters, because who prunes harder is worse at every budget.
    """

    metric: str
    rung: int
    pairs: int
    tau: float | None
    bands: tuple[float | None, ...]

    @property
    def is_low(self) -> bool:
        """Whether the smaller budget is a poor guide."""
        return self.tau is not None and self.pairs >= ENOUGH and self.tau < LOW


def agreements(records: Sequence[Record], objectives: Sequence[Objective], rungs: int) -> list[Agreement]:
    """For each pair of neighbouring rungs and each objective that training can change, lowest rung first."""
    cost = cost_of(objectives)
    found = []
    for rung in range(rungs - 1):
        both = [(low, high) for one in records if (low := one.at(rung)) and (high := one.at(rung + 1))]
        bands = bands_of([high.value(cost) for _, high in both]) if cost is not None else []
        for objective in objectives:
            metric = objective.metric
            if metric in METRICS and METRICS[metric].computed:
                continue
            pairs = [(low.value(metric), high.value(metric)) for low, high in both]
            within = [[pair for pair, its in zip(pairs, bands, strict=False) if its == band] for band in range(BANDS)]
            found.append(Agreement(metric, rung, len(pairs), kendall_tau(pairs), tuple(map(kendall_tau, within))))
    return found


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Tau-b: 1 same order, 0 unrelated, -1 reversed; None for fewer than three pairs, or when all of one are equal."""
    if len(pairs) < FEWEST:
        return None
    low, high = (np.sign(np.subtract.outer(values, values)) for values in np.array(pairs, dtype=np.float64).T)
    untied = float(np.sqrt(np.square(low).sum() * np.square(high).sum()))
    return float((low * high).sum()) / untied if untied else None
