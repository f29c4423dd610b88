"""The Pareto front of a study, its hypervolume and its knee: pure functions over records and objectives.

Inside, every objective is minimized: a maximized metric changes its sign once, in `points`. A record takes part when
its last evaluation is complete, every objective is a finite number, and no other record has a complete one at a higher
rung: only equal budgets are compared.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunesearch.config import Limit, Objective
from prunesearch.confirmation import confirmation_row
from prunesearch.errors import StudyError
from prunesearch.evaluate.limits import Limits, total_excess
from prunesearch.record import Record
from prunesearch.strict import to_mapping

_NOTHING = (
    "front: it is empty. Possible: a study with at least one complete candidate within its limits. "
    "Run the search longer, or start one with wider limits."
)


def values_of(record: Record) -> dict[str, float]:
    """What was measured of a candidate at its highest rung so far; empty when there is nothing, or it failed."""
    evaluation = record.evaluation
    return dict(evaluation.metrics) if evaluation is not None and evaluation.status == "complete" else {}


def highest_rung(records: Sequence[Record]) -> int:
    """The rung that records are compared at: the highest one where any of them is complete, 0 when none is anywhere."""
    return max((record.rung_done for record in records if values_of(record)), default=0)


def comparable(records: Sequence[Record], objectives: Sequence[Objective], limits: Limits = ()) -> list[Record]:
    """The records at the highest rung that have a finite number for every objective and are within the limits."""
    rung = highest_rung(records)
    there = [record for record in records if record.rung_done == rung]
    return [record for record in there if _takes_part(values_of(record), objectives, limits)]


def points(records: Sequence[Record], objectives: Sequence[Objective]) -> np.ndarray:
    """Objectives of comparable records as (records, objectives) float64, all of them to be minimized."""
    rows = [[_sign(objective) * values_of(record)[objective.metric] for objective in objectives] for record in records]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(objectives))


def front(records: Sequence[Record], objectives: Sequence[Objective], limits: Limits = ()) -> list[Record]:
    """The comparable records that no other one dominates, in order of `cost_objective`, best first.

    Of records with equal values in all objectives the one with the lowest number stays.
    """
    candidates = sorted(comparable(records, objectives, limits), key=lambda record: record.number)
    values = points(candidates, objectives)
    # whoever dominates a point precedes it in this order, so that each is compared with those kept before it only
    order = np.lexsort(values.T[::-1]) if candidates else np.array([], dtype=int)
    kept: list[int] = []
    for index in order:
        if not (values[kept] <= values[index]).all(axis=1).any():
            kept.append(int(index))
    column = cost_objective(objectives)
    return [candidates[index] for index in sorted(kept, key=lambda index: (values[index, column], index))]


def cost_objective(objectives: Sequence[Objective]) -> int:
    """Which objective a front is ordered by: the first minimized one, or the last when all are maximized."""
    goals = [objective.goal for objective in objectives]
    return goals.index("minimize") if "minimize" in goals else len(goals) - 1


# --- one number for a front --------------------------------------------------------------------------------------


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """Volume that points (n, objectives), minimized, dominate up to the reference point. Exact.

    Points that are not better than the reference in every objective count nothing. By slicing along the last
    objective, O(n log n) for two objectives and O(n^(k-1) log n) for k: meant for one to four.
    """
    inside = values[(values < reference).all(axis=1)]
    if len(inside) == 0:
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    depth = np.diff(inside[:, -1], append=reference[-1])
    if inside.shape[1] == 2:
        return float((reference[0] - np.minimum.accumulate(inside[:, 0])) @ depth)
    slices = (hypervolume(inside[: index + 1, :-1], reference[:-1]) for index in np.flatnonzero(depth))
    return float(np.fromiter(slices, dtype=np.float64) @ depth[depth > 0])


def dense_of(records: Sequence[Record]) -> Record | None:
    """The dense model of a study at the rung that records are compared at, or None while there is no such result."""
    rung, dense = highest_rung(records), [record for record in records if record.origin == "dense"]
    return next((record for record in dense if values_of(record) and record.rung_done == rung), None)


def reference_point(dense: Record, objectives: Sequence[Objective]) -> np.ndarray:
    """The point that hypervolumes of a study are measured from, (objectives,) and minimized like `points`.

    Ten per cent above the dense model for a minimized metric, half of it for a maximized one. Fixed by the dense
    model and not by what was found, so that the numbers of a study can be compared over time.
    """
    values = points([dense], objectives)[0]
    return values + np.abs(values) * _margins(objectives)


def normalised_hypervolume(
    records: Sequence[Record], objectives: Sequence[Objective], dense: Record | None, limits: Limits = ()
) -> float | None:
    """Hypervolume of the records' front as a share of the box from the reference point to the ideal.

    The ideal costs nothing (0 of each minimized metric) and is as good as the dense model in each maximized one; 1 is
    that ideal, and more than 1 is possible where a maximized metric, such as throughput, exceeds the dense model's.
    None when there is no such box: without a dense result, or when one of its objectives is not above 0.
    """
    if dense is None or not comparable([dense], objectives):
        return None
    if not all(values_of(dense)[objective.metric] > 0 for objective in objectives):
        return None
    reference = reference_point(dense, objectives)
    maximized = np.array([objective.goal == "maximize" for objective in objectives])
    ideal = np.where(maximized, points([dense], objectives)[0], 0.0)
    found = points(front(records, objectives, limits), objectives)
    return hypervolume(found, reference) / float(np.prod(reference - ideal))


# --- choosing one ------------------------------------------------------------------------------------------------


def knee(found: Sequence[Record], objectives: Sequence[Objective]) -> Record:
    """The bend of a front: the record farthest below the chord (with more than two objectives, the plane) between
    its extremes, each objective scaled to [0, 1] over the front.

    When none is below it, as always with one or two records, the best by the first objective. Raises StudyError for
    an empty front.
    """
    if not found:
        raise StudyError(_NOTHING)
    values = points(found, objectives)
    extent = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    # the distance from the plane through the extremes is (1 - sum) / sqrt(objectives); rounded, so that ties are ties
    sums = np.round(scaled.sum(axis=1), 9)
    return found[min(range(len(found)), key=lambda index: (sums[index], values[index, 0], found[index].number))]


def best(
    records: Sequence[Record],
    objectives: Sequence[Objective],
    at_most: Mapping[str, float],
    at_least: Mapping[str, float],
    limits: Limits = (),
) -> Record:
    """The best record within bounds on any measured metrics and the study's limits.

    Best by the first objective that is not itself bounded (by the first one when all are); ties go to the other
    objectives in order, then to the lowest number. Raises StudyError when there is none, with the nearest that is.
    """
    bounds = [(name, Limit(at_most=value)) for name, value in at_most.items()]
    bounds += [(name, Limit(at_least=value)) for name, value in at_least.items()]
    measured = comparable(records, objectives, limits)
    if not measured:
        raise StudyError(_NOTHING)
    for name, _ in bounds:
        if not any(name in values_of(record) for record in measured):
            known = ", ".join(sorted({metric for record in measured for metric in values_of(record)}))
            raise StudyError(f"bound on {name}: this study did not measure it. Possible: {known}. Bound one of them.")
    within = comparable(measured, objectives, bounds)
    if not within:
        raise StudyError(nothing_within(bounds, measured))
    bounded = {name for name, _ in bounds}
    order = sorted(range(len(objectives)), key=lambda index: objectives[index].metric in bounded)  # free ones first
    values = points(within, objectives)
    rank = [(*values[index, order], record.number) for index, record in enumerate(within)]
    return within[rank.index(min(rank))]


def front_rows(records: Sequence[Record], objectives: Sequence[Objective]) -> list[dict[str, Any]]:
    """Records as plain values for JSON: objectives first among the metrics, the schedule as in a schedule file."""
    rows = []
    for record in records:
        evaluation, values = record.evaluation, values_of(record)
        names = dict.fromkeys([objective.metric for objective in objectives if objective.metric in values] + [*values])
        rows.append(
            {
                "trial": record.number,
                "uid": record.uid,
                "origin": record.origin,
                "metrics": {name: values[name] for name in names},
                "tokens": list(evaluation.tokens) if evaluation else [],
                "finetuned_images": evaluation.images if evaluation else 0,
                "schedule": to_mapping(record.outcome),
                **({"data_notes": list(evaluation.data_notes)} if evaluation and evaluation.data_notes else {}),
                **({"again": confirmation_row(record)} if record.confirmations else {}),
            }
        )
    return rows


def _sign(objective: Objective) -> float:
    return -1.0 if objective.goal == "maximize" else 1.0


def _margins(objectives: Sequence[Objective]) -> np.ndarray:
    return np.array([0.5 if objective.goal == "maximize" else 0.1 for objective in objectives])


def _takes_part(values: Mapping[str, float], objectives: Sequence[Objective], limits: Limits) -> bool:
    finite = all(math.isfinite(values.get(objective.metric, math.nan)) for objective in objectives)
    return finite and all(limit.excess(values.get(name, math.nan)) <= 0 for name, limit in limits)


def nothing_within(bounds: Limits, measured: Sequence[Record]) -> str:
    """What to say when none of these records, one or more, is within the bounds: which one is nearest."""

    def distance(record: Record) -> tuple[float, int]:
        values = values_of(record)
        is_known = not any(math.isnan(values.get(name, math.nan)) for name, _ in bounds)
        return total_excess(bounds, values) if is_known else math.inf, record.number

    nearest = min(measured, key=distance)
    asked = " and ".join(
        f"{name} at most {limit.at_most:g}" if limit.at_most is not None else f"{name} at least {limit.at_least:g}"
        for name, limit in bounds
    )
    there = ", ".join(f"{name} {values_of(nearest)[name]:.5g}" for name, _ in bounds if name in values_of(nearest))
    return (
        f"bounds: no candidate has {asked} ({len(measured)} were compared). Possible: the nearest is trial "
        f"{nearest.number} with {there}. Loosen the bound, or search further."
    )


def nondominated_ranks(losses: np.ndarray) -> np.ndarray:
    """(n, objectives) -> (n,): 0 for the front, 1 for the front of what is left without it, and so on.

    Equal points have the same rank. O(n log n) for one and two objectives, O(n^2) memory and time for more.
    """
    count, objectives = losses.shape
    if objectives > 2:
        return _ranks_by_pairs(losses)
    first, second = losses[:, 0], losses[:, -1] if objectives == 2 else np.zeros(count)
    ranks = np.zeros(count, dtype=int)
    ends: list[float] = []  # of each front, the second loss of its last member so far: the smallest one, ascending
    before: tuple[float, float] | None = None
    rank = 0
    for index in np.lexsort((second, first)):
        point = float(first[index]), float(second[index])
        if point != before:
            rank = bisect_right(ends, point[1])
            ends[rank : rank + 1] = [point[1]]
            before = point
        ranks[index] = rank
    return ranks


def _ranks_by_pairs(losses: np.ndarray) -> np.ndarray:
    no_worse = np.ones((len(losses), len(losses)), dtype=bool)
    for column in losses.T:
        no_worse &= column[:, None] <= column[None, :]
    dominates = no_worse & ~no_worse.T
    ranks = np.full(len(losses), -1)
    rank = 0
    while (left := ranks < 0).any():
        ranks[left & ~dominates[left].any(axis=0)] = rank
        rank += 1
    return ranks
