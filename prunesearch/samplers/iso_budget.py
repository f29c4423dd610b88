"""Candidates that all cost the same: a suggestion is moved onto a budget before it becomes a candidate.

All keep ratios get the same exponent t, keep -> keep^t: above 1 every stage removes more, below 1 less, and the order
of the stages by keep ratio does not change. Tokens are whole, so a part of the budget may be left. It is spent on more
tokens in the last stages first, where a token costs the least. Stages with a count (tokens) and blocks without a stage
stay as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

from prunesearch.config import SpaceConfig, StudyConfig
from prunesearch.cost import MACS, CostTable, total_cost
from prunesearch.errors import ScheduleError
from prunesearch.evaluate.limits import CostBudget, bound_in_words, budget_of, computed_limits
from prunesearch.schedule import Place, Schedule, Stage, resolve
from prunesearch.shape import ModelShape
from prunesearch.space.choices import BlockChoices, blocks_of, is_counted, may_return, until_of
from prunesearch.tokens import REDUCERS

GRID = 10_000
"""Keep ratios are multiples of 1/GRID: short to read, and finer than one token."""
BISECTIONS = 20
"""Steps of the search for an exponent."""


def within_budget(schedule: Schedule, shape: ModelShape, budget: CostBudget) -> Schedule:
    """The schedule moved onto a budget: never above it, and so near to it that no stage could keep one token more.

    Raises ScheduleError when it costs more than the budget with the smallest keep ratios, or less with the largest.
    """

    def is_down(strength: float) -> bool:  # an impossible schedule keeps too few tokens
        cost = _cost(_powered(schedule, strength), shape, budget.table)
        return cost is None or cost <= budget.amount

    def fits(candidate: Schedule) -> bool:
        cost = _cost(candidate, shape, budget.table)
        return cost is not None and cost <= budget.amount

    found = _powered(schedule, _turn(is_down)[1])
    if is_down(0.0) or not fits(found):
        possible = "Possible: other stages. Choose more, or earlier ones."
        raise ScheduleError(
            f"budget.{budget.metric}", [f"{budget.amount:g}; {schedule} cannot come to this. {possible}"]
        )
    for index in reversed(range(len(found.stages))):
        while (fuller := _with_one_more(found, index, shape)) is not None and fits(fuller):
            found = fuller
    steps = zip(found.stages, resolve(found, shape), strict=True)
    return Schedule(tuple(stage for stage, step in steps if not step.is_idle))


def _powered(schedule: Schedule, strength: float) -> Schedule:
    def moved(stage: Stage) -> Stage:
        if stage.keep is None:
            return stage
        return replace(stage, keep=max(round(stage.keep**strength * GRID), 1) / GRID)

    return Schedule(tuple(map(moved, schedule.stages)))


def _turn(holds: Callable[[float], bool]) -> tuple[float, float]:
    """The largest exponent t for which a condition was found not to hold, and the smallest for which it holds, by
    bisection over u = t / (1 + t)."""
    low, high = 0.0, 1.0 - 2.0**-BISECTIONS
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle / (1 - middle)) else (middle, high)
    return low / (1 - low), high / (1 - high)


def _with_one_more(schedule: Schedule, index: int, shape: ModelShape) -> Schedule | None:
    """The schedule with one token more after a stage; None when the stage has a count, or no ratio below 1 gives it."""
    stage, step = schedule.stages[index], resolve(schedule, shape)[index]
    keep = math.floor((step.kept + 1) * GRID / step.before) / GRID
    if stage.keep is None or not stage.keep < keep < 1:
        return None
    return Schedule((*schedule.stages[:index], replace(stage, keep=keep), *schedule.stages[index + 1 :]))


def _cost(schedule: Schedule, shape: ModelShape, table: CostTable) -> float | None:
    """In the unit of the table; None for an impossible schedule."""
    try:
        return total_cost(shape, schedule, table)
    except ScheduleError:
        return None


# --- what is wrong with a budget ---------------------------------------------------------------------------------


def budget_problems(config: StudyConfig, shape: ModelShape) -> list[str]:
    """Mistakes in the `budget` of a study, if it has one. Its space must be without mistakes."""
    if config.budget is None:
        return []
    if len(config.budget.written) != 1:
        possible = " or ".join(field.name for field in dataclasses.fields(config.budget))
        return [f"budget: {len(config.budget.written)} costs are given. Possible: one, {possible}. Give that."]
    budget = budget_of(config)
    if budget is None:
        return []
    if config.space.targets or any("threshold" in block.amount for block in blocks_of(config.space)):
        return [
            "budget: given, but the space has thresholds, whose cost is known only after training. Possible: keep "
            "ratios; for thresholds a target in the space. Leave out the one or the other."
        ]
    name, problems = budget.metric, []
    written = bound_in_words(budget.written, budget.amount)
    least, dense = _least(config.space, shape, budget.table), total_cost(shape, Schedule(), budget.table)
    if not least <= budget.amount < dense:
        problems.append(
            f"budget.{name}: {written}; possible: from {least:.4g}, the least that this space can reach, to below the "
            f"dense model's {dense:.4g}. Change it, or allow more stages."
        )
    limit = dict(computed_limits(config)).get(name)
    if limit is None and all(objective.metric != name for objective in config.objectives):
        problems.append(
            f"budget: no objective or limit is on {name}, so that the dense model would be compared as if it kept to "
            f"the budget. Possible: either. Write limits: {{{name}: {{at_most: {budget.written}}}}}."
        )
    if limit is not None and limit.at_most is not None and limit.at_most < budget.amount:
        problems.append(
            f"limits.{name}: at most {limit.at_most:g}, but every candidate costs the budget, {written}. "
            f"Possible: from {budget.amount:g}. Raise it, or leave it out."
        )
    return problems


def _least(space: SpaceConfig, shape: ModelShape, table: CostTable) -> float:
    """Cost of the cheapest schedule that a suggestion can be moved to, of those with one verb and one score."""
    costs = (
        _cost(_powered(schedule, _strongest(schedule, shape)), shape, table) for schedule in _with_all_stages(space)
    )
    return min((cost for cost in costs if cost is not None), default=math.inf)


def _strongest(schedule: Schedule, shape: ModelShape) -> float:
    """The largest exponent that leaves a possible schedule."""
    return _turn(lambda strength: _cost(_powered(schedule, strength), shape, MACS) is None)[0]


def _with_all_stages(space: SpaceConfig) -> Iterator[Schedule]:
    """Schedules with as many stages as the space allows, in the first blocks: one for each place, score, verb and time
    of return."""
    blocks = sorted(blocks_of(space), key=lambda block: block.block)[: space.max_stages]
    ats, scores, verbs, returns = (
        dict.fromkeys(itertools.chain.from_iterable(getattr(block, field) for block in blocks))
        for field in ("at", "score", "reduce", "until")
    )
    for at, score, verb, until in itertools.product(ats, scores, verbs, returns):
        stages = [_stage(block, at, score, verb, until) for block in blocks]
        yield Schedule(tuple(stage for stage in stages if stage is not None))


def _stage(block: BlockChoices, at: str, score: str, verb: str, until: str) -> Stage | None:
    ranks = REDUCERS[verb].ranks
    if verb not in block.reduce or at not in block.at or (ranks and score not in block.score):
        return None
    if may_return(verb) and until not in block.until:
        return None
    stage = Stage(block.block, cast(Place, at), score if ranks else "none", keep=0.5, reduce=verb)
    stage = replace(stage, until=until_of(until, verb))
    return replace(stage, keep=None, tokens=min(map(int, block.tokens or ()))) if is_counted(verb, block) else stage
