"""The Pareto front of a study, its hypervolume and its knee: pure functions over records and objectives.

Inside this file every objective is minimized: `points` changes the sign of maximized metrics. A record takes part when
its last evaluation is complete, lies within the limits, and has a finite number for every objective. Only records at
the highest rung that is complete for any record take part, so that equal budgets are compared.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from prunesearch.config import Objective
from prunesearch.confirmation import confirmation_row, speed_row
from prunesearch.errors import StudyError
from prunesearch.evaluate.limits import Limits, total_excess
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record, Sibling
from prunesearch.strict import to_mapping

_NOTHING = (
    "front: it is empty. Possible: a study with at least one complete candidate within its limits. "
    "Run the search longer, or start one with wider limits."
)


class Evaluated(Protocol):
    """A candidate or a dense sibling: both are compared by their last evaluation."""

    @property
    def evaluation(self) -> Evaluation | None: ...


def values_of(record: Evaluated) -> dict[str, float]:
    """Metrics of a candidate's last evaluation, at its highest rung so far; empty when it has none or failed."""
    evaluation = record.evaluation
    return dict(evaluation.metrics) if evaluation is not None and evaluation.status == "complete" else {}


def highest_rung(records: Sequence[Record]) -> int:
    """The rung at which records are compared: the highest one where any of them is complete, else 0."""
    return max((record.rung_done for record in records if values_of(record)), default=0)


def comparable(records: Sequence[Record], objectives: Sequence[Objective], limits: Limits = ()) -> list[Record]:
    """The records at the highest rung that have a finite number for every objective and are within the limits."""
    rung = highest_rung(records)
    there = [record for record in records if record.rung_done == rung]
    return [record for record in there if _takes_part(values_of(record), objectives, limits)]


def points(records: Sequence[Evaluated], objectives: Sequence[Objective]) -> np.ndarray:
    """Objectives of comparable records, float64 (records, objectives), all of them to be minimized."""
    rows = [[_sign(objective) * values_of(record)[objective.metric] for objective in objectives] for record in records]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(objectives))


def front(records: Sequence[Record], objectives: Sequence[Objective], limits: Limits = ()) -> list[Record]:
    """The comparable records that no other one dominates, in order of `cost_objective`, best first.

    When records have equal values in all objectives, only the one with the lowest number stays.
    """
    candidates = sorted(comparable(records, objectives, limits), key=lambda record: record.number)
    values = points(candidates, objectives)
    # in lexicographic order a point comes after all that dominate it: comparing it with the kept ones is enough
    order = np.lexsort(values.T[::-1]) if candidates else np.array([], dtype=int)
    kept: list[int] = []
    for index in order:
        if not (values[kept] <= values[index]).all(axis=1).any():
            kept.append(int(index))
    column = cost_objective(objectives)
    return [candidates[index] for index in sorted(kept, key=lambda index: (values[index, column], index))]


def comparable_siblings(siblings: Sequence[Sibling], objectives: Sequence[Objective]) -> list[Sibling]:
    """The dense siblings that were measured and have a finite number for every objective, whatever the limits."""
    return [sibling for sibling in siblings if _takes_part(values_of(sibling), objectives, ())]


def beats(first: Evaluated, second: Evaluated, objectives: Sequence[Objective]) -> bool:
    """Whether one is no worse than the other in every objective, and better in one. Both have all objectives."""
    one, other = points([first, second], objectives)
    return bool((one <= other).all() and (one < other).any())


def cost_objective(objectives: Sequence[Objective]) -> int:
    """Index of the objective that orders a front: the first minimized one, or the last when all are maximized."""
    goals = [objective.goal for objective in objectives]
    return goals.index("minimize") if "minimize" in goals else len(goals) - 1


# --- one number for a front --------------------------------------------------------------------------------------


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """Exact volume between points (n, objectives), all minimized, and the reference point.

    Points that are not better than the reference in every objective are ignored. The volume is cut into slices along
    the last objective: O(n log n) for two objectives, O(n^(k-1) log n) for k. Meant for one to four objectives.
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
    """The record of the dense model at the rung where records are compared; None while it has no result there."""
    rung, dense = highest_rung(records), [record for record in records if record.origin == "dense"]
    return next((record for record in dense if values_of(record) and record.rung_done == rung), None)


def reference_point(dense: Record, objectives: Sequence[Objective]) -> np.ndarray:
    """Reference point for the hypervolumes of a study: (objectives,), to be minimized as in `points`.

    For a minimized metric it is 10 % above the dense model's value, for a maximized one half of it. It depends on the
    dense model only, so that a study's hypervolumes can be compared over time.
    """
    values = points([dense], objectives)[0]
    return values + np.abs(values) * _margins(objectives)


def normalised_hypervolume(
    records: Sequence[Record], objectives: Sequence[Objective], dense: Record | None, limits: Limits = ()
) -> float | None:
    """Hypervolume of the records' front as a share of the box from the reference point to the ideal.

    The ideal has 0 in each minimized metric and the dense model's value in each maximized one. A front that reaches it
    has 1. More than 1 is possible when a maximized metric, such as throughput, exceeds the dense model's.
    None without a dense result, or when one of its objectives is not above 0.
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
    """The knee of a front: the record farthest below the line (with more than two objectives, the plane) through its
    extremes. Each objective is scaled to [0, 1] over the front.

    When no record is below it, as with one or two records, the best by the first objective. Raises StudyError for an
    empty front.
    """
    if not found:
        raise StudyError(_NOTHING)
    values = points(found, objectives)
    extent = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    # the distance from the plane through the extremes is (1 - sum) / sqrt(objectives); rounding makes near ties equal
    sums = np.round(scaled.sum(axis=1), 9)
    return found[min(range(len(found)), key=lambda index: (sums[index], values[index, 0], found[index].number))]


def best(records: Sequence[Record], objectives: Sequence[Objective], bounds: Limits, limits: Limits = ()) -> Record:
    """The best record within bounds on any measured metrics and the study's limits.

    Best by the first objective that is not itself bounded (by the first one when all are); ties go to the other
    objectives in order, then to the lowest number. When there is none, raises StudyError, which names the nearest one.
    """
    within = _within(records, objectives, bounds, limits)
    bounded = {name for name, _ in bounds}
    order = sorted(range(len(objectives)), key=lambda index: objectives[index].metric in bounded)  # free ones first
    return _first(within, objectives, order)


def cheapest(
    records: Sequence[Record], objectives: Sequence[Objective], kept: Limits, bounds: Limits = (), limits: Limits = ()
) -> tuple[Record, Objective]:
    """The cheapest record that keeps some metrics, within further bounds and the study's limits; and its objective.

    The objective is `cost_objective` among those whose metrics are not kept. Ties go to the other objectives in order,
    then to the lowest number. Raises StudyError as `best`, and when all objectives are kept.
    """
    names = {name for name, _ in kept}
    free = [objective for objective in objectives if objective.metric not in names]
    if not free:
        raise StudyError(
            f"bound on {', '.join(sorted(names))}: with it no objective of the study is left as the cost. Possible: a "
            f"study with an objective such as gmacs or throughput. Keep fewer of them, or choose a trial by hand."
        )
    cost = free[cost_objective(free)]
    order = sorted(range(len(objectives)), key=lambda index: objectives[index] is not cost)
    return _first(_within(records, objectives, [*kept, *bounds], limits), objectives, order), cost


def _within(records: Sequence[Record], objectives: Sequence[Objective], bounds: Limits, limits: Limits) -> list[Record]:
    measured = comparable(records, objectives, limits)
    if not measured:
        raise StudyError(_NOTHING)
    for name, _ in bounds:
        if not any(name in values_of(record) for record in measured):
            known = ", ".join(sorted({metric for record in measured for metric in values_of(record)}))
            raise StudyError(f"bound on {name}: this study did not measure it. Possible: {known}. Bound one of them.")
    within = comparable(measured, objectives, bounds)
    if not within:  # the study's own limits left some out already, and may be the ones to loosen
        raise StudyError(nothing_within((*limits, *bounds), comparable(records, objectives)))
    return within


def _first(records: Sequence[Record], objectives: Sequence[Objective], order: Sequence[int]) -> Record:
    """The best record by the objectives in this order, then by number."""
    values = points(records, objectives)
    rank = [(*values[index, order], record.number) for index, record in enumerate(records)]
    return records[rank.index(min(rank))]


def front_rows(records: Sequence[Record], objectives: Sequence[Objective]) -> list[dict[str, Any]]:
    """Records as plain values for JSON. Objectives come first among the metrics."""
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
                **({"speed": speed_row(record.speed)} if record.speed else {}),
            }
        )
    return rows


def sibling_rows(
    siblings: Sequence[Sibling], found: Sequence[Record], objectives: Sequence[Objective]
) -> list[dict[str, Any]]:
    """Measured dense siblings as plain values for JSON. They have the keys of `front_rows`, and "sibling".

    beaten_by, beats: trials of the front `found`, compared as in `beats`.
    """
    rows = []
    for sibling in comparable_siblings(siblings, objectives):
        values = values_of(sibling)
        names = dict.fromkeys([*(objective.metric for objective in objectives), *values])
        rows.append(
            {
                "trial": None,
                "uid": sibling.uid,
                "origin": f"dense sibling: {sibling.name}",
                "metrics": {name: values[name] for name in names},
                "tokens": list(sibling.evaluation.tokens) if sibling.evaluation else [],
                "finetuned_images": 0,
                "schedule": None,
                "sibling": to_mapping(sibling.model),
                "beaten_by": [record.number for record in found if beats(record, sibling, objectives)],
                "beats": [record.number for record in found if beats(sibling, record, objectives)],
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
    """Error message when no record is within the bounds; it names the nearest. measured: one record or more."""
    bounds = [(name, limit) for name, limit in bounds if limit.judges]

    def distance(record: Record) -> tuple[float, int]:
        values = values_of(record)
        is_known = not any(math.isnan(values.get(name, math.nan)) for name, _ in bounds)
        return total_excess(bounds, values) if is_known else math.inf, record.number

    nearest = min(measured, key=distance)
    asked = " and ".join(f"{name} {limit}" for name, limit in bounds)
    there = ", ".join(f"{name} {values_of(nearest)[name]:.5g}" for name, _ in bounds if name in values_of(nearest))
    return (
        f"limits: no candidate has {asked} ({len(measured)} were compared). Possible: the nearest is trial "
        f"{nearest.number} with {there}. Loosen the limit, or search further."
    )


def nondominated_ranks(losses: np.ndarray) -> np.ndarray:
    """Nondominated ranks (n,) of points (n, objectives): 0 for the front, 1 for the front of the rest, and so on.

    All objectives are minimized. Equal points have the same rank. O(n log n) for one and two objectives; more than
    two take O(n^2) memory and time for each rank.
    """
    count, objectives = losses.shape
    if objectives > 2:
        return _ranks_by_pairs(losses)
    first, second = losses[:, 0], losses[:, -1] if objectives == 2 else np.zeros(count)
    ranks = np.zeros(count, dtype=int)
    ends: list[float] = []  # per front, the smallest second loss so far, which is its last member's; ascending
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
