"""Predict the front of damage and cost from sensitivities, by dynamic programming over the blocks.

The predicted damage of a schedule is the sum of the damage of each of its stages alone (KL divergence, measured with
all tokens present). Its cost by the cost table (MACs, or milliseconds of a profile) is exact. The state of the dynamic
program is what later costs depend on (`State`). For each state only schedules are kept that no other one beats in both
damage and cost.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from prunesearch.config import Range, SpaceConfig
from prunesearch.cost import MACS, CostTable, gives_sizes, tokens_scored
from prunesearch.errors import ScheduleError
from prunesearch.evaluate.sensitivity import Effect
from prunesearch.schedule import (
    END,
    NEXT,
    Schedule,
    Stage,
    Step,
    blocks_read,
    reads_attention,
    resolve,
    until_in_words,
)
from prunesearch.shape import ModelShape
from prunesearch.space.choices import BlockChoices, blocks_of, may_return, parameters_of

MOST_POINTS = 256
"""Most points kept of the front of a state. A dropped point has a kept one within 1/255 of the range of costs."""


@dataclass(frozen=True)
class Predicted:
    """A schedule with its predicted divergence (nats) and its cost in the unit of the cost table."""

    schedule: Schedule
    divergence: float
    cost: float


class State(NamedTuple):
    """What the cost of later blocks depends on.

    present: patch tokens. attended: tokens in the attention of the last block, prefix tokens included; a score at `pre`
    of the next block reads that attention; 0 where none does. stages: so far; 0 if the space does not limit them.
    sized: tokens have sizes, which attention adds to its logits; False if that costs nothing in the table.
    back, sized_back: what present and sized are again when the next stage comes; 0 if no tokens come back then.
    end: patch tokens that are back at the end; 0 if none come back.
    """

    present: int
    attended: int
    stages: int
    sized: bool = False
    back: int = 0
    sized_back: bool = False
    end: int = 0


class Move(NamedTuple):
    """One block with or without a stage: the state after it, and the cost and damage that it adds."""

    state: State
    cost: float
    damage: float


@dataclass(frozen=True)
class _Paths:
    """The front of one state, one entry per path, ascending in cost.

    cost, damage: so far. before, place: index of the previous state, and index into the front of that state. choice:
    index of the chosen effect; -1 is no stage.
    """

    cost: np.ndarray
    damage: np.ndarray
    before: np.ndarray
    place: np.ndarray
    choice: np.ndarray


def predicted_front(
    effects: Sequence[Effect], space: SpaceConfig, shape: ModelShape, table: CostTable = MACS
) -> list[Predicted]:
    """The schedules of a space on the predicted front of divergence and cost, cheapest first.

    Includes the dense model if the space does. Exact as long as no state has more than MOST_POINTS points.
    """
    found = [point for group in _groups(effects, space) for point in _front_of(group, space, shape, table)]
    found.sort(key=lambda point: (point.cost, point.divergence))
    best: list[Predicted] = []
    for point in found:
        if not best or point.divergence < best[-1].divergence:
            best.append(point)
    return best


def _groups(effects: Sequence[Effect], space: SpaceConfig) -> Iterator[list[Effect]]:
    """Split the effects by the fields that all stages of a schedule must share (`space.same`): one group per set of
    values."""
    values: dict[str, list[Any]] = {}
    for field in ("at", "score", "reduce", "keep", "until"):
        if field in space.same:
            given = dict.fromkeys(getattr(effect.stage, field) for effect in effects)
            values[field] = [value for value in given if value != "none"] or ["none"]
    for shared in itertools.product(*values.values()):
        wanted = dict(zip(values, shared, strict=True))
        # verbs that do not rank tokens have score "none", which fits any shared score
        yield [
            effect
            for effect in effects
            if all(
                getattr(effect.stage, field) in (value, "none")
                or (field == "until" and not may_return(effect.stage.reduce))
                for field, value in wanted.items()
            )
        ]


def _front_of(effects: Sequence[Effect], space: SpaceConfig, shape: ModelShape, table: CostTable) -> list[Predicted]:
    start = State(shape.patch_tokens, 0, 0)
    nothing = np.zeros(1, dtype=np.int64)
    layers = [{start: _Paths(nothing + table.whole(shape), np.zeros(1), nothing, nothing, nothing)}]
    by_block = {block.block: block for block in blocks_of(space)}
    for index in range(shape.depth):
        block = by_block.get(index)
        can_skip = block is None or _can_skip(block, space)
        options: list[tuple[int, Effect | None]] = [(-1, None)] if can_skip else []
        options += [(place, effect) for place, effect in enumerate(effects) if effect.stage.block == index]
        is_read = any((effect.stage.block, effect.stage.at) == (index + 1, "pre") for effect in effects)
        layers.append(_next_layer(layers[-1], options, can_skip, is_read, space.max_stages, shape, table))
    points = []
    for state, paths in layers[-1].items():
        end = table.end(shape, (state.end or state.back or state.present) + shape.prefix_tokens)
        rows = zip(paths.cost + end, paths.damage, itertools.count(), itertools.repeat(state))
        points += [(float(cost), float(damage), place, state) for cost, damage, place, state in rows]
    points.sort(key=lambda point: point[:2])
    found: list[Predicted] = []
    for cost, damage, place, state in points:
        if found and damage >= found[-1].divergence:
            continue
        stages = _stages(layers, state, place, effects)
        found.append(Predicted(Schedule(tuple(stages)), damage, cost / table.per_unit))
    return [point for point in found if parameters_of(point.schedule, space) is not None]


def _next_layer(
    layer: dict[State, _Paths],
    options: Sequence[tuple[int, Effect | None]],
    can_skip: bool,
    is_read: bool,
    max_stages: int | None,
    shape: ModelShape,
    table: CostTable,
) -> dict[State, _Paths]:
    arriving: defaultdict[State, list[_Paths]] = defaultdict(list)
    for number, (state, paths) in enumerate(layer.items()):
        size = len(paths.cost)
        places, before = np.arange(size), np.full(size, number)
        moves = [
            (_move(state, effect, can_skip, is_read, max_stages, shape, table), choice) for choice, effect in options
        ]
        for (after, cost, damage), choice in _undominated([(move, choice) for move, choice in moves if move]):
            chosen = np.full(size, choice)
            arriving[after].append(_Paths(paths.cost + cost, paths.damage + damage, before, places, chosen))
    return {state: _thinned(_joined(parts)) for state, parts in arriving.items()}


def _undominated(moves: Sequence[tuple[Move, int]]) -> list[tuple[Move, int]]:
    """Drop moves for which a cheaper or equal one does no more damage and leads to the same state."""
    best: list[tuple[Move, int]] = []
    for move, choice in sorted(moves):
        last = best[-1][0] if best else None
        if last is None or last.state != move.state or move.damage < last.damage:
            best.append((move, choice))
    return best


def _move(
    state: State,
    effect: Effect | None,
    can_skip: bool,
    is_read: bool,
    max_stages: int | None,
    shape: ModelShape,
    table: CostTable,
) -> Move | None:
    """The move of one block with a stage (effect None: without one). None when the stage is not possible here."""
    prefix = shape.prefix_tokens
    if effect is None:
        tokens = state.present + prefix
        unchanged = state._replace(attended=tokens if is_read else 0)
        return Move(unchanged, table.block(shape, tokens, tokens, state.sized), 0.0)
    stage, present, sized_before = effect.stage, state.present, state.sized
    if state.back:
        present, sized_before = state.back, state.sized_back
        if stage.at == "pre" and reads_attention(stage):
            return None  # the attention that it reads says nothing of those that come back before it
    step, until = _step(stage, present, shape), until_in_words(stage, shape)
    if step is None or (step.is_idle and can_skip) or (state.end and until is None):
        return None
    stages = state.stages if max_stages is None else state.stages + 1
    if max_stages is not None and stages > max_stages:
        return None
    attended = (step.after if stage.at == "pre" else present) + prefix
    sized = sized_before or (table.knows_sizes and not step.is_idle and gives_sizes(step))
    cost = table.block(shape, attended, step.after + prefix, sized if stage.at == "pre" else sized_before)
    if not step.is_idle:
        seen = {stage.block: attended, stage.block - 1: state.attended}
        scored = tokens_scored(step, present, blocks_read([step])[0], seen)
        cost += table.stage(shape, step, present, step.after, scored)
    after = State(step.after, attended if is_read else 0, stages, sized, end=state.end)
    if until == NEXT and not step.is_idle:
        after = after._replace(back=present, sized_back=sized_before)
    elif until == END and not step.is_idle:
        after = after._replace(end=state.end or present)
    return Move(after, cost, 0.0 if step.is_idle else effect.divergence)


@lru_cache(maxsize=100_000)
def _step(stage: Stage, present: int, shape: ModelShape) -> Step | None:
    try:
        return resolve(Schedule((stage,)), replace(shape, patch_tokens=present))[0]
    except ScheduleError:
        return None


def _joined(parts: Sequence[_Paths]) -> _Paths:
    """The front of several sets of paths. Of equal paths the first is kept."""
    columns = [np.concatenate(column) for column in zip(*(vars(part).values() for part in parts), strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    damage = columns[1][order]
    best = np.minimum.accumulate(damage)
    is_better = np.concatenate([[True], damage[1:] < best[:-1]])
    return _Paths(*(column[order[is_better]] for column in columns))


def _thinned(paths: _Paths) -> _Paths:
    """At most MOST_POINTS of a front: the path with the least damage of each cost bin, and the cheapest one."""
    size = len(paths.cost)
    if size <= MOST_POINTS:
        return paths
    bins = np.linspace(paths.cost[0], paths.cost[-1], MOST_POINTS)
    chosen = np.unique(np.concatenate([[0], np.searchsorted(paths.cost, bins[1:], side="right") - 1]))
    return _Paths(*(column[chosen] for column in vars(paths).values()))


def _stages(layers: Sequence[dict[State, _Paths]], state: State, place: int, effects: Sequence[Effect]) -> list[Stage]:
    stages: list[Stage] = []
    for layer, before in zip(reversed(layers[1:]), reversed(layers[:-1]), strict=True):
        paths = layer[state]
        choice = int(paths.choice[place])
        if choice >= 0:
            stages.append(effects[choice].stage)
        state, place = list(before)[int(paths.before[place])], int(paths.place[place])
    return stages[::-1]


def _can_skip(block: BlockChoices, space: SpaceConfig) -> bool:
    """Whether a schedule of the space may have stages at other blocks and none at this one."""
    has_full = block.keep.high == 1.0 if isinstance(block.keep, Range) else 1.0 in block.keep
    by_keep = "keep" in block.amount and has_full and "keep" not in space.same
    return by_keep or ("none" in block.amount and "amount" not in space.same)
