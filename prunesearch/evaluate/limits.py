"""Limits on metrics: from what a study says to numbers, and how far values exceed them.

A study may bound a metric by a share of the dense model's value ("70%"), or by how much worse than that value it may
be. `resolved_limits` is the one place that turns such bounds into numbers. All other code sees numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from prunesearch.config import Limit, Objective, StudyConfig, Target
from prunesearch.cost import CostTable
from prunesearch.evaluate.metrics import METRICS, Goal
from prunesearch.schedule import Schedule

ROUNDING = 1e-9
"""Share of the dense model's value by which a drop may be larger. 98.6 - 97.6 is 1 only in exact arithmetic."""


@dataclass(frozen=True)
class AbsoluteLimit:
    """Bounds on one metric, as numbers in its unit. With none of them the metric is not judged."""

    at_most: float | None = None
    at_least: float | None = None

    @property
    def judges(self) -> bool:
        """Whether there is any bound."""
        return self.at_most is not None or self.at_least is not None

    def excess(self, value: float) -> float:
        """How far a value lies outside the bounds, in its unit. 0 or less: within them. NaN gives NaN: not within."""
        above = [] if self.at_most is None else [value - self.at_most]
        below = [] if self.at_least is None else [self.at_least - value]
        return max(above + below, default=0.0)

    def __str__(self) -> str:
        most = [] if self.at_most is None else [f"at most {self.at_most:.5g}"]
        least = [] if self.at_least is None else [f"at least {self.at_least:.5g}"]
        return " and ".join(most + least) or "not judged"


Limits = Sequence[tuple[str, AbsoluteLimit]]
"""Metrics by name, each with its bounds."""
WrittenLimits = Sequence[tuple[str, Limit]]
"""The same as a study file has it."""


# --- relative to the dense model ---------------------------------------------------------------------------------


def share_of_dense(bound: float | str | None) -> float | None:
    """The percentage that a bound such as "70%" stands for: 70.0. None for a number, and without a bound."""
    return float(bound.replace("%", "")) if isinstance(bound, str) else None


def is_relative(limit: Limit) -> bool:
    """Whether a limit needs the dense model's value."""
    return limit.drop_at_most is not None or any(isinstance(bound, str) for bound in (limit.at_most, limit.at_least))


def in_numbers(bound: float | str | None, dense: float | None) -> float | None:
    """A bound as a number in the metric's unit. dense: the dense model's value; None when it is not known.

    None without a bound, and when the bound is a share of a value that is not known or not above 0.
    """
    if not isinstance(bound, str):
        return bound
    if dense is None or not 0 < dense < math.inf:
        return None
    return float(Fraction(bound.replace("%", "")) * Fraction(dense) / 100)  # 0.7 * 90 is below 63 in floating point


def goal_of(metric: str, objectives: Iterable[Objective] = ()) -> Goal | None:
    """Which way of a metric is better: as the objectives say, else as it is registered. None: nothing says so here."""
    goals = (objective.goal for objective in objectives if objective.metric == metric)
    return next(goals, METRICS[metric].goal if metric in METRICS else None)


def resolved_limits(
    limits: WrittenLimits, dense: Mapping[str, float], objectives: Iterable[Objective] = ()
) -> tuple[tuple[str, AbsoluteLimit], ...]:
    """The limits of a study as numbers, in the same order.

    dense: what is known of the dense model, by metric. A bound that needs a value which is not there is left out, so
    that nothing is judged by it. objectives: of the study; they say which way of a metric is better.
    """
    objectives = tuple(objectives)
    return tuple((name, _resolved(limit, dense.get(name), goal_of(name, objectives))) for name, limit in limits)


def _resolved(limit: Limit, dense: float | None, goal: Goal | None) -> AbsoluteLimit:
    most, least = in_numbers(limit.at_most, dense), in_numbers(limit.at_least, dense)
    if limit.drop_at_most is not None and dense is not None:
        drop = limit.drop_at_most + ROUNDING * abs(dense)
        if goal == "maximize":
            least = dense - drop if least is None else max(least, dense - drop)
        elif goal == "minimize":
            most = dense + drop if most is None else min(most, dense + drop)
    return AbsoluteLimit(most, least)


def computed_dense(limits: WrittenLimits, target: Target) -> dict[str, float]:
    """The dense model's value of each computed metric that has a relative limit. Raises ModelError."""
    values = {}
    for name, limit in limits:
        value = _value_of_dense(name, target) if name in METRICS and is_relative(limit) else None
        if value is not None:
            values[name] = value
    return values


@lru_cache(maxsize=64)
def _value_of_dense(metric: str, target: Target) -> float | None:
    return METRICS[metric].of(target, Schedule())


def measured_relative(limits: WrittenLimits, target: Target) -> list[str]:
    """Metrics with a limit that needs the dense model's measured value. Raises ModelError."""
    computed = computed_dense(limits, target)
    return [name for name, limit in limits if is_relative(limit) and name not in computed]


class CostBudget(NamedTuple):
    """What every candidate costs: an amount in the unit of a table. metric: of that cost. written: as in the study."""

    metric: str
    amount: float
    table: CostTable
    written: float | str


def budget_of(config: StudyConfig) -> CostBudget | None:
    """The budget of a study; None when it has none, or one that no table knows.

    Raises ModelError for a share of an unknown model, and DeviceError without a profile that it needs.
    """
    for metric, written in () if config.budget is None else config.budget.written.items():
        costs, limit = METRICS[metric].costs, Limit(at_most=written)
        amount = in_numbers(written, computed_dense([(metric, limit)], config.target).get(metric))
        if costs is not None and amount is not None:
            return CostBudget(metric, amount, costs(config.target), written)
    return None


def bound_in_words(bound: float | str | None, number: float | None, unknown: str = "") -> str:
    """A bound as text: "3.5", or "70 % = 3.22". number: what a share comes to; when it is None, `unknown` is said."""
    share = share_of_dense(bound)
    if share is None:
        return f"{bound:g}"
    if number is not None:
        return f"{share:g} % = {number:.5g}"
    return f"{share:g} % ({unknown})" if unknown else f"{share:g} %"


def in_words(name: str, limit: Limit, dense: float | None, goal: Goal | None, unknown: str) -> str:
    """A limit as text, with the numbers that it comes to: "gmacs at most 70 % = 3.22".

    dense: the dense model's value; None when it is not known. unknown: what to say then, in place of the number.
    goal: which way is better; None when nothing says so.
    """
    parts = [
        f"{word} {bound_in_words(bound, in_numbers(bound, dense), unknown)}"
        for word, bound in (("at most", limit.at_most), ("at least", limit.at_least))
        if bound is not None
    ]
    if limit.drop_at_most is not None:
        found = _resolved(Limit(drop_at_most=limit.drop_at_most), dense, goal)
        parts.append(
            f"at most {limit.drop_at_most:g} worse than dense {f'= {found}' if found.judges else f'({unknown})'}"
        )
    return f"{name} {' and '.join(parts)}"


# --- how far values exceed them ----------------------------------------------------------------------------------


def excess(limits: Limits, values: Mapping[str, float]) -> dict[str, float]:
    """How far each limited metric that has a value exceeds its limit, in the metric's unit. 0 or less: within it."""
    return {name: limit.excess(values[name]) for name, limit in limits if name in values and limit.judges}


def total_excess(limits: Limits, values: Mapping[str, float]) -> float:
    """Sum of how far limits are exceeded, each as a share of its bound. 0: within all of them."""
    found = excess(limits, values)
    return sum(max(found[name], 0.0) / _size(limit) for name, limit in limits if name in found)


def computed_excess(limits: Limits, target: Target, schedule: Schedule) -> dict[str, float]:
    """`excess` for metrics that are computed from the schedule. Raises ScheduleError when it does not fit the model."""
    values = {}
    for name, limit in limits:
        value = METRICS[name].of(target, schedule) if limit.judges else None
        if value is not None:
            values[name] = value
    return excess(limits, values)


def computed_limits(config: StudyConfig) -> Limits:
    """The limits of a study as far as arithmetic knows them. Raises ModelError."""
    return resolved_limits(config.limits, computed_dense(config.limits, config.target), config.objectives)


def is_within(limits: Limits, target: Target, schedule: Schedule) -> bool:
    """Whether a schedule keeps the limits on computed metrics. Raises ScheduleError as `computed_excess`."""
    return all(amount <= 0 for amount in computed_excess(limits, target, schedule).values())


def _size(limit: AbsoluteLimit) -> float:
    bound = limit.at_most if limit.at_most is not None else limit.at_least
    return abs(bound or 0.0) or 1.0
