"""The parameters of a search space, and how their values become a candidate schedule and back.

No parameter is conditional: every candidate has a value for each of them, because multivariate samplers need it.
Parameters that have no effect in a candidate, such as the score of a block without a stage, are set to their first
choice before a sampler learns from it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from hashlib import blake2b
from typing import TypeVar, cast

from prunesearch.config import BlockSpace, Range, SpaceConfig, ThresholdRange
from prunesearch.errors import ScheduleError
from prunesearch.schedule import END, NEXT, Place, Schedule, Stage, canonical, resolve
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS, SCORERS

Value = float | str
Values = tuple[Value, ...] | Range | ThresholdRange
FIELDS = ("amount", "keep", "threshold", "merge_threshold", "tokens", "at", "score", "reduce", "until")
"""The fields of a stage that can be searched. Each is one parameter per block, or one for all blocks (space.same)."""
NEVER = "never"
UNTIL = (NEVER, NEXT, END)
"""Values of `space.until`."""
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A parameter whose values have no order that a sampler could use."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Interval:
    """A number from low to high (inclusive): on a grid when it has a step, else continuous. log: on a log scale."""

    low: float
    high: float
    step: float | None
    log: bool = False


Dimension = Choice | Interval


def dimensions(space: SpaceConfig) -> dict[str, Dimension]:
    """The parameters that have more than one value, by name, in the order of the blocks.

    A list of numbers at equal distances is an Interval, so that samplers see its order. Other lists are a Choice.
    """
    named = ((name, _dimension(values)) for name, values in _fields(space).items())
    return {name: dimension for name, dimension in named if dimension is not None}


def schedule_from(parameters: Mapping[str, Value], space: SpaceConfig, shape: ModelShape) -> Schedule:
    """The candidate of these values. Raises ScheduleError when it exceeds `max_stages` or does not fit the model."""
    schedule = _schedule(parameters, space)
    if space.max_stages is not None and len(schedule.stages) > space.max_stages:
        raise ScheduleError(
            "space.max_stages",
            [f"{len(schedule.stages)} stages; possible: at most {space.max_stages}. Leave some blocks without one."],
        )
    resolve(schedule, shape)
    return schedule


def parameters_of(schedule: Schedule, space: SpaceConfig) -> dict[str, Value] | None:
    """The inverse of `schedule_from`: the values that stand for a schedule, or None when it lies outside the space.

    Parameters without effect get their first choice.
    """
    schedule = replace(schedule, stages=tuple(stage for stage in schedule.stages if stage.keep != 1.0))
    if space.max_stages is not None and len(schedule.stages) > space.max_stages:
        return None
    by_block = {stage.block: stage for stage in schedule.stages}
    parameters: dict[str, Value] = {}
    if schedule.target is not None:
        parameters[schedule.target.field] = schedule.target.amount
    for block in blocks_of(space):
        stage = by_block.get(block.block)
        if stage is None:
            # parameters that all stages share (space.same) are set by the other stages; if amount is one of them, it
            # cannot be none here, and keep 1.0 leaves the stage out
            said = space.same if by_block else ()
            leaves_out = "none" in block.amount and "amount" not in said
            parameters[_name("amount", block, space)] = "none" if leaves_out else "keep"
            if not leaves_out:
                parameters[_name("keep", block, space)] = 1.0
                readers = [verb for verb in block.reduce if not is_counted(verb, block)]
                if readers and "reduce" not in said:
                    parameters[_name("reduce", block, space)] = readers[0]
            continue
        if stage.keep is not None:
            parameters[_name("amount", block, space)] = "keep"
            parameters[_name("keep", block, space)] = stage.keep
        elif stage.threshold is not None:
            parameters[_name("amount", block, space)] = "threshold"
            parameters[_name(_threshold_field(stage.reduce), block, space)] = stage.threshold
        elif is_counted(stage.reduce, block):
            parameters[_name("amount", block, space)] = "keep"
            parameters[_name("tokens", block, space)] = float(stage.tokens or 0)
        else:
            return None
        parameters[_name("at", block, space)] = stage.at
        parameters[_name("reduce", block, space)] = stage.reduce
        if may_return(stage.reduce):
            parameters[_name("until", block, space)] = NEVER if stage.until is None else str(stage.until)
        if REDUCERS[stage.reduce].ranks:
            parameters[_name("score", block, space)] = stage.score
    full: dict[str, Value] = {}
    for name, dimension in dimensions(space).items():
        value = parameters.get(name, _first(dimension))
        if not _holds(dimension, value):
            return None
        full[name] = value
    return full if _schedule(full, space) == schedule else None


def combinations(space: SpaceConfig) -> int | None:
    """How many combinations of values there are; None when a parameter is continuous."""
    total = 1
    for dimension in dimensions(space).values():
        values = _values(dimension)
        if values is None:
            return None
        total *= len(values)
    return total


def combination(space: SpaceConfig, index: int) -> dict[str, Value]:
    """The index-th combination of values of a space that has finitely many (`combinations`)."""
    parameters = {}
    for name, dimension in dimensions(space).items():
        values = _values(dimension)
        assert values is not None, "only a finite space can be counted"
        index, position = divmod(index, len(values))
        parameters[name] = values[position]
    return parameters


def any_value(dimension: Dimension, generator: random.Random) -> Value:
    """A random value: uniform, for an interval with `log` uniform in the logarithm."""
    if isinstance(dimension, Choice):
        return generator.choice(dimension.values)
    if dimension.log:
        return math.exp(generator.uniform(math.log(dimension.low), math.log(dimension.high)))
    if dimension.step is None:
        return generator.uniform(dimension.low, dimension.high)
    steps = round((dimension.high - dimension.low) / dimension.step)
    return dimension.low + generator.randint(0, steps) * dimension.step


def anything(space: Mapping[str, Dimension], generator: random.Random) -> dict[str, Value]:
    """A random value for each parameter, drawn by `any_value`."""
    return {name: any_value(dimension, generator) for name, dimension in space.items()}


def mutated(
    parameters: Mapping[str, Value], space: Mapping[str, Dimension], generator: random.Random
) -> dict[str, Value]:
    """A neighbour: one or two values drawn anew."""
    names = generator.sample(list(space), k=min(len(space), generator.randint(1, 2)))
    return {**parameters, **{name: any_value(space[name], generator) for name in names}}


def uid_of(schedule: Schedule, shape: ModelShape) -> str:
    """Identity of a schedule on a model: 12 hexadecimal digits, the same for all schedules with one canonical form.

    Raises ScheduleError as `resolve`.
    """
    written = canonical(schedule, shape)
    stages: list[object] = [
        (stage.block, stage.at, stage.score, stage.tokens, stage.reduce, stage.options)
        if stage.tokens is not None
        else (stage.block, stage.at, stage.score, stage.keep, stage.threshold, stage.reduce, stage.options)
        for stage in written.stages
    ]
    stages += [(index, stage.until) for index, stage in enumerate(written.stages) if stage.until is not None]
    target = written.target
    if target is not None:  # GMACs stand without their name, as they did when there was no other target
        stages.append(target.amount if written.target_gmacs is not None else (target.field, target.amount))
    return blake2b(repr(stages).encode(), digest_size=6).hexdigest()


# --- the choices of one block ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockChoices:
    """The choices of one block. Fields that the block does not give are taken from the whole space."""

    block: int
    keep: tuple[float, ...] | Range
    at: tuple[str, ...]
    score: tuple[str, ...]
    reduce: tuple[str, ...]
    amount: tuple[str, ...]
    threshold: tuple[float, ...] | ThresholdRange | None
    merge_threshold: tuple[float, ...] | ThresholdRange | None
    tokens: tuple[int, ...] | None
    until: tuple[str, ...]


def blocks_of(space: SpaceConfig) -> list[BlockChoices]:
    """The choices of each block, in the order of `space.blocks`."""

    def own_or_shared(own: T | None, shared: T) -> T:
        return shared if own is None else own

    blocks = []
    for entry in space.blocks:
        own = BlockSpace(entry) if isinstance(entry, int) else entry
        blocks.append(
            BlockChoices(
                own.block,
                own_or_shared(own.keep, space.keep),
                own_or_shared(own.at, space.at),
                own_or_shared(own.score, space.score),
                own_or_shared(own.reduce, space.reduce),
                own_or_shared(own.amount, space.amount),
                own_or_shared(own.threshold, space.threshold),
                own_or_shared(own.merge_threshold, space.merge_threshold),
                own_or_shared(own.tokens, space.tokens),
                own_or_shared(own.until, space.until),
            )
        )
    return blocks


def _name(field: str, block: BlockChoices, space: SpaceConfig) -> str:
    return field if field in space.same else f"block{block.block}.{field}"


def _fields(space: SpaceConfig) -> dict[str, Values]:
    """The values of all fields of all blocks, by parameter name. Fields with a single value are included.

    Fields that no choice of the block can use are left out.
    """
    fields: dict[str, Values] = {}
    for block in blocks_of(space):
        given: dict[str, Values | None] = {"amount": block.amount, "at": block.at, "reduce": block.reduce}
        if "keep" in block.amount:
            counted = [is_counted(verb, block) for verb in block.reduce]
            given["keep"] = None if all(counted) else block.keep
            given["tokens"] = tuple(map(float, block.tokens or ())) if any(counted) else None
        if "threshold" in block.amount:
            given |= {_threshold_field(verb): getattr(block, _threshold_field(verb)) for verb in block.reduce}
        if any(REDUCERS[verb].ranks for verb in block.reduce):
            given["score"] = block.score
        if any(map(may_return, block.reduce)):
            given["until"] = block.until
        fields |= {_name(field, block, space): values for field, values in given.items() if values is not None}
    return fields | space.targets


def _schedule(parameters: Mapping[str, Value], space: SpaceConfig) -> Schedule:
    fields = _fields(space)

    def value(name: str) -> Value:
        values = fields[name]
        given = parameters.get(name)
        if given is None:
            return values[0] if isinstance(values, tuple) else values.low
        return _exact(values, given)

    stages = []
    for block in blocks_of(space):
        name = {field: _name(field, block, space) for field in FIELDS}
        reduce = str(value(name["reduce"]))
        score = str(value(name["score"])) if REDUCERS[reduce].ranks else "none"
        amount = str(value(name["amount"]))
        if amount == "threshold" and not takes_threshold(score, reduce):
            if "amount" in space.same:
                raise ScheduleError(
                    f"block {block.block}",
                    [f"all stages have a threshold, but {reduce} (score {score}) takes a count. Choose other ones."],
                )
            amount = "keep"
        if amount == "none":
            continue
        until = until_of(str(value(name["until"])), reduce) if may_return(reduce) else None
        stage = Stage(block.block, cast(Place, value(name["at"])), score, keep=1.0, reduce=reduce, until=until)
        if amount == "threshold":
            stage = replace(stage, keep=None, threshold=float(value(name[_threshold_field(reduce)])))
        elif is_counted(reduce, block):
            stage = replace(stage, keep=None, tokens=int(value(name["tokens"])))
        else:
            stage = replace(stage, keep=float(value(name["keep"])))
        if stage.keep != 1.0:
            stages.append(stage)
    adaptive = any(stage.is_adaptive for stage in stages)
    targets = {field: float(value(field)) for field in space.targets} if adaptive else {}
    return Schedule(tuple(stages), **targets)


def takes_threshold(score: str, reduce: str) -> bool:
    """Whether a search can give a stage a threshold. Learned scores get a keep ratio, to which they are trained."""
    learns = score in SCORERS and SCORERS[score].part is not None
    return REDUCERS[reduce].takes_threshold and not learns


def may_return(reduce: str) -> bool:
    """Whether a search can say when the tokens of this verb are back. `hold` says it itself: before the next stage."""
    return not REDUCERS[reduce].pools and not REDUCERS[reduce].holds


def until_of(word: str, reduce: str) -> str | None:
    """`until` of a stage with this verb for a word of `UNTIL`."""
    return word if word != NEVER and may_return(reduce) else None


def is_counted(reduce: str, block: BlockChoices) -> bool:
    """Whether the search gives this verb a count instead of a ratio: it pools, and the block has `tokens`."""
    return REDUCERS[reduce].pools and block.tokens is not None


def _threshold_field(reduce: str) -> str:
    return "threshold" if REDUCERS[reduce].ranks else "merge_threshold"


# --- one parameter -----------------------------------------------------------------------------------------------


def _dimension(values: Values) -> Dimension | None:
    """The values as a dimension; None when there is only one."""
    if isinstance(values, ThresholdRange):
        return Interval(values.low, values.high, None, values.log) if values.low < values.high else None
    if isinstance(values, Range):
        return Interval(values.low, values.high, values.step) if values.low < values.high else None
    if len(values) < 2:
        return None
    numbers = sorted(Decimal(repr(value)) for value in values if isinstance(value, float))
    distances = {after - before for before, after in itertools.pairwise(numbers)}
    if len(numbers) == len(values) and len(distances) == 1:
        return Interval(float(numbers[0]), float(numbers[-1]), float(distances.pop()))
    return Choice(values)


def _values(dimension: Dimension) -> tuple[Value, ...] | None:
    if isinstance(dimension, Choice):
        return dimension.values
    return None if dimension.step is None else tuple(grid_of(dimension))


def grid_of(interval: Interval | Range) -> Iterator[float]:
    """The values of an interval with a step, computed exactly in decimals."""
    low, high, step = (Decimal(repr(number)) for number in (interval.low, interval.high, interval.step))
    return (float(low + index * step) for index in range(int((high - low) / step) + 1))


def _exact(values: Values, given: Value) -> Value:
    """The nearest value that the study file allows. This undoes rounding: 0.7000000001 becomes 0.7."""
    if isinstance(given, str):
        return given
    if isinstance(values, ThresholdRange):
        return min(max(given, values.low), values.high)
    on_grid = values if not isinstance(values, Range) else tuple(grid_of(values)) if values.step is not None else None
    return given if on_grid is None else min(on_grid, key=lambda value: abs(float(value) - given))


def _first(dimension: Dimension) -> Value:
    return dimension.values[0] if isinstance(dimension, Choice) else dimension.low


def _holds(dimension: Dimension, value: Value) -> bool:
    values = _values(dimension)
    if values is not None:
        return value in values
    return isinstance(dimension, Interval) and isinstance(value, float) and dimension.low <= value <= dimension.high
