"""Limits relative to the dense model, from what a study has measured of it: pure functions over records.

The dense model is a candidate like others: it is evaluated first, and at every rung. A limit compares the values of a
rung with the dense model's at the same rung. As long as that is not known, nothing is judged by the limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prunesearch.config import StudyConfig
from prunesearch.errors import StudyError
from prunesearch.evaluate.limit_problems import drop_problem
from prunesearch.evaluate.limits import (
    Limits,
    WrittenLimits,
    computed_dense,
    goal_of,
    in_numbers,
    in_words,
    is_relative,
    measured_relative,
    resolved_limits,
)
from prunesearch.evaluate.metrics import METRICS
from prunesearch.front import front, highest_rung
from prunesearch.record import Record
from prunesearch.registry import did_you_mean


def dense_record(records: Iterable[Record]) -> Record | None:
    """The candidate that is the dense model; None when the study does not have it yet."""
    return next((record for record in records if record.origin == "dense"), None)


def limits_at(config: StudyConfig, dense: Record | None, rung: int) -> Limits:
    """The limits for values of a rung, as numbers. For a search, which knows the model. Raises ModelError.

    dense: as `dense_record` gives it.
    """
    computed = computed_dense(config.limits, config.target)
    return resolved_limits(config.limits, {**_recorded(dense, rung), **computed}, config.objectives)


def front_within(config: StudyConfig, records: Sequence[Record]) -> list[Record]:
    """The Pareto front of a study within its limits, at the rung where records are compared."""
    limits = limits_at(config, dense_record(records), highest_rung(records))
    return front(records, config.objectives, limits)


def limits_of(config: StudyConfig, records: Sequence[Record]) -> Limits:
    """The limits at the rung where records are compared, as numbers. For looking at a study: needs records alone."""
    return resolved_limits(config.limits, _known(records), config.objectives)


def limit_lines(config: StudyConfig, records: Sequence[Record]) -> list[str]:
    """The limits at the rung where records are compared, as text: "gmacs at most 70 % = 3.22"."""
    dense, lines = _known(records), []
    for name, limit in config.limits:
        goal = goal_of(name, config.objectives)
        why = _unknown(name, records) if goal is not None or limit.drop_at_most is None else _unregistered(name)
        lines.append(in_words(name, limit, dense.get(name), goal, f"not judged, as {why}"))
    return lines


def asked_limits(asked: WrittenLimits, config: StudyConfig, records: Sequence[Record]) -> Limits:
    """Bounds that a user asks for when looking at a study, as numbers.

    Raises StudyError when the dense model's value is needed and not there.
    """
    dense = _known(records)
    for name, limit in asked:
        refused = drop_problem(name) if limit.drop_at_most is not None else None
        if refused is not None:
            raise StudyError(f"bound on {name}: {refused}")
        if limit.drop_at_most is not None and goal_of(name, config.objectives) is None:
            possible = [*METRICS, *(objective.metric for objective in config.objectives)]
            raise StudyError(
                f"bound on {name}: {_unregistered(name)}. Possible: an objective of this study, or a metric of "
                f"prunesearch.{did_you_mean(name, possible)} Bound one."
            )
        if is_relative(limit) and name not in dense:
            known = ", ".join(sorted(dense)) or "none yet"
            raise StudyError(
                f"bound on {name}: it is relative to the dense model, but {_unknown(name, records)}. Possible: what "
                f"is known of it ({known}), or a number. Give a number, or run the search until it is known."
            )
        for bound in (limit.at_most, limit.at_least):
            if bound is not None and in_numbers(bound, dense.get(name)) is None:
                raise StudyError(
                    f"bound on {name}: {bound} of the dense model's value, which is {dense[name]:g}. Possible: a share "
                    f"of a value above 0. Give a number."
                )
    return resolved_limits(asked, dense, config.objectives)


def dense_problem(config: StudyConfig, dense: Record | None) -> str | None:
    """Why limits can never be judged: the dense model failed, or a share of its value makes no sense. None: they can,
    or it is not known yet. Raises ModelError."""
    needed = measured_relative(config.limits, config.target)
    if not needed or dense is None:
        return None
    named, last = ", ".join(f"limits.{name}" for name in needed), dense.evaluation
    todo = "Mend the cause or write a number, and search under another name (--set name=...)."
    if dense.state == "failed" and last is not None:
        trace = f"\n{last.traceback}" if last.traceback else ""
        where = f" at rung {last.rung}" if last.rung else ""
        return (
            f"{named}: relative to the dense model, whose evaluation failed{where} ({last.cause}): {last.error}. "
            f"Possible: a dense model that can be measured, or limits as numbers. {todo}{trace}"
        )
    for evaluation in dense.evaluations:
        values = dict(evaluation.metrics)
        for name, limit in config.limits:
            is_share = isinstance(limit.at_most, str) or isinstance(limit.at_least, str)
            if name in needed and is_share and not values.get(name, 1.0) > 0:
                return (
                    f"limits.{name}: a share of the dense model's value, which is {values[name]:g} at rung "
                    f"{evaluation.rung}. Possible: a share of a value above 0, drop_at_most, or a number. {todo}"
                )
    return None


def _known(records: Sequence[Record]) -> dict[str, float]:
    return _recorded(dense_record(records), highest_rung(records))


def _recorded(dense: Record | None, rung: int) -> dict[str, float]:
    """What a study knows of the dense model at a rung. Computed metrics are the same at every rung."""
    values: dict[str, float] = {}
    for evaluation in () if dense is None else dense.evaluations:
        if evaluation.status == "complete":
            values |= {
                name: value
                for name, value in evaluation.metrics
                if evaluation.rung == rung or (name in METRICS and METRICS[name].computed)
            }
    return values


def _unknown(name: str, records: Sequence[Record]) -> str:
    """Why the dense model's value of a metric is not there."""
    dense, rung, known = dense_record(records), highest_rung(records), _known(records)
    if name in known:
        return f"its value is {known[name]:g}, of which there is no share"
    if dense is not None and dense.state == "failed":
        return "the evaluation of the dense model failed"
    if dense is None or dense.at(rung) is None:
        return f"the dense model has no result at rung {rung} yet" if rung else "the dense model has no result yet"
    return f"this study did not measure {name} of the dense model"


def _unregistered(name: str) -> str:
    return f"nothing says which way of {name} is better: no metric of prunesearch or an imported plug-in has this name"
