"""Draw random schedules of a space, and search for its cheapest one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from prunesearch.config import SpaceConfig, Target
from prunesearch.cost import estimate_cost
from prunesearch.errors import ScheduleError, StudyError
from prunesearch.evaluate.limits import Limits, is_within
from prunesearch.evaluate.shapes import model_shape
from prunesearch.schedule import Schedule, resolve
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
"""Number of random schedules of which the cheapest starts the local search for the cheapest of all."""


class TooLarge(Exception):
    """The local search would take more changes than allowed."""


def draw_schedule(
    space: SpaceConfig, limits: Limits, target: Target, generator: random.Random, draws: int = MOST_DRAWS
) -> Schedule:
    """Draw a random schedule of the space that is within the limits on computed metrics.

    Each parameter is uniform. When there are more stages than `max_stages`, a random part of them is kept.
    Raises StudyError when `draws` draws give none.
    """
    shape, choices = model_shape(target.model), dimensions(space)
    unbounded = replace(space, max_stages=None)
    for _ in range(draws):
        parameters = anything(choices, generator)
        try:
            schedule = _thinned(schedule_from(parameters, unbounded, shape), space, generator)
            if schedule is None:
                continue
            resolve(schedule, shape)  # without some stages other counts arrive, from which a verb may not get as low
            if is_within(limits, target, schedule):
                return schedule
        except ScheduleError:
            pass  # these values do not fit together
    raise StudyError(
        f"space: none of {draws} random schedules is within the limits, so shared weights cannot be trained. "
        f"Possible: a space of which a good part is within them. Loosen limits, or narrow the space to what is."
    )


@lru_cache(maxsize=2)
def cheapest_schedule(space: SpaceConfig, limits: Limits, target: Target) -> Schedule:
    """The schedule with the fewest MACs that `improved` finds from random ones. Always the same for the same arguments.

    Raises StudyError when no random schedule is within the limits.
    """
    shape = model_shape(target.model)

    def cost(schedule: Schedule) -> float:
        return estimate_cost(shape, schedule).macs if is_within(limits, target, schedule) else math.inf

    generator = random.Random(0)
    starts = [draw_schedule(space, limits, target, generator) for _ in range(LOCAL_STARTS)]
    return improved(starts, space, shape, cost)


def improved(
    starts: Iterable[Schedule],
    space: SpaceConfig,
    shape: ModelShape,
    cost: Callable[[Schedule], float],
    enough: float = -math.inf,
    most: float = math.inf,
) -> Schedule:
    """Improve the best of the starts by local search, until no change lowers the cost or it is at most `enough`.

    A change sets one parameter. With `max_stages` it can also set two at once, to exchange one stage for another.
    cost: may raise ScheduleError for schedules that do not fit the model. Raises TooLarge when more than `most` changes
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
    """The schedule with a random part of its stages, when it has too many. None when the result is not in the space."""
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
