"""Rank correlation between the results of neighbouring rungs: how well a small budget predicts a larger one.

Only promoted candidates have both results. They are the better ones, so the correlation is underestimated.
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
"""With fewer pairs of results no correlation is computed."""
ENOUGH = 8
"""From this many pairs of results on, a low correlation is reported as such."""
LOW = 0.5


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b of one objective between `rung` and the next one, over `pairs` candidates that have both.

    bands: tau within each third of the range of costs, cheapest first; None where there are too few pairs. The overall
    tau is biased upwards, because candidates that prune harder are worse at every budget.
    """

    metric: str
    rung: int
    pairs: int
    tau: float | None
    bands: tuple[float | None, ...]

    @property
    def is_low(self) -> bool:
        """Whether the smaller budget is a poor predictor (tau below LOW, from ENOUGH pairs)."""
        return self.tau is not None and self.pairs >= ENOUGH and self.tau < LOW


def agreements(records: Sequence[Record], objectives: Sequence[Objective], rungs: int) -> list[Agreement]:
    """The agreement of each pair of neighbouring rungs (lowest first) in each objective that training can change."""
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
    """Kendall's tau-b: 1 is the same order, 0 unrelated, -1 reversed. None for fewer than FEWEST pairs, or when all
    values on one side are equal."""
    if len(pairs) < FEWEST:
        return None
    low, high = (np.sign(np.subtract.outer(values, values)) for values in np.array(pairs, dtype=np.float64).T)
    untied = float(np.sqrt(np.square(low).sum() * np.square(high).sum()))
    return float((low * high).sum()) / untied if untied else None
