"""Schedules of a space that shared weights are trained with: any, and the cheapest."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from prunesearch.config import ModelConfig, SpaceConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import ScheduleError, StudyError
from prunesearch.evaluate.limits import Limits, is_within
from prunesearch.evaluate.shapes import model_shape
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape
from prunesearch.space.choices import (
    Choice,
    Dimension,
    Interval,
    Value,
    anything,
    dimensions,
    grid_of,
    parameters_of,
    schedule_from,
)

MOST_DRAWS = 10_000
LOCAL_STARTS = 32
"""Random schedules, from the cheapest of which the search for the cheapest of all begins."""


class TooLarge(Exception):
    """A space takes longer to be searched than there is time."""


def draw_schedule(
    space: SpaceConfig, limits: Limits, model: ModelConfig, generator: random.Random, draws: int = MOST_DRAWS
) -> Schedule:
    """A schedule of the space whose parameters are each uniformly random, among those within the limits that
    arithmetic knows; with more stages than `max_stages` allows, a random part of them.

    Raises StudyError when none is found in so many draws.
    """
    shape, choices = model_shape(model), dimensions(space)
    unbounded = replace(space, max_stages=None)
    for _ in range(draws):
        parameters = anything(choices, generator)
        try:
            schedule = _thinned(schedule_from(parameters, unbounded, shape), space, generator)
            if schedule is not None and is_within(limits, model, schedule):
                return schedule
        except ScheduleError:
            pass  # these choices do not go together
    raise StudyError(
        f"space: none of {draws} random schedules is within the limits, so shared weights cannot be trained. "
        f"Possible: a space of which a good part is within them. Loosen limits, or narrow the space to what is."
    )


@lru_cache(maxsize=2)
def cheapest_schedule(space: SpaceConfig, limits: Limits, model: ModelConfig) -> Schedule:
    """The schedule of fewest MACs that a local search finds: from a random one, changing one parameter at a time (also
    two at once where `max_stages` makes a stage give way to another) as long as that makes it cheaper. Always the same.

    Raises StudyError when the space has none within the limits.
    """
    shape = model_shape(model)

    def cost(schedule: Schedule) -> float:
        return estimate_cost(shape, schedule).macs if is_within(limits, model, schedule) else math.inf

    generator = random.Random(0)
    starts = [draw_schedule(space, limits, model, generator) for _ in range(LOCAL_STARTS)]
    return improved(starts, space, shape, cost)


def improved(
    starts: Iterable[Schedule],
    space: SpaceConfig,
    shape: ModelShape,
    cost: Callable[[Schedule], float],
    enough: float = -math.inf,
    most: float = math.inf,
) -> Schedule:
    """The best of the starts, made better by a local search: one parameter at a time (two at once where `max_stages`
    makes a stage give way to another) is changed, as long as that lowers the cost and it is above `enough`.

    cost: may raise ScheduleError for a schedule that fits no such model. Raises TooLarge when more than `most` changes
    would have to be tried.
    """
    values, best = dimensions(space), min(starts, key=cost)
    lowest, parameters = cost(best), parameters_of(best, space)
    assert parameters is not None, "starts lie in the space"
    improves = True
    while improves and lowest > enough:
        improves = False
        for change in _changes(values, pairs=space.max_stages is not None):
            most -= 1
            if most < 0:
                raise TooLarge
            try:
                schedule = schedule_from({**parameters, **change}, space, shape)
                found = cost(schedule)
            except ScheduleError:
                continue
            if found < lowest:
                lowest, best, parameters, improves = found, schedule, {**parameters, **change}, True
    return best


def _thinned(schedule: Schedule, space: SpaceConfig, generator: random.Random) -> Schedule | None:
    """The schedule, with a random part of its stages when it has too many; None when the space cannot leave them
    out."""
    most = space.max_stages
    if most is None or len(schedule.stages) <= most:
        return schedule
    kept = sorted(generator.sample(range(len(schedule.stages)), generator.randint(1, most)))
    thinned = replace(schedule, stages=tuple(schedule.stages[index] for index in kept))
    return None if parameters_of(thinned, space) is None else thinned


def _changes(space: Mapping[str, Dimension], pairs: bool) -> Iterator[dict[str, Value]]:
    for name, dimension in space.items():
        values: Iterable[Value] = _ends(dimension)
        if isinstance(dimension, Interval) and dimension.step is not None:
            values = grid_of(dimension)
        yield from ({name: value} for value in values)
    for one, other in itertools.combinations(space, 2) if pairs else ():
        yield from ({one: a, other: b} for a in _ends(space[one]) for b in _ends(space[other]))


def _ends(dimension: Dimension) -> tuple[Value, ...]:
    return dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
