"""Find limits that no schedule of a space can keep, before anything is trained."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import partial

from prunesearch.config import SpaceConfig, Target
from prunesearch.errors import StudyError
from prunesearch.evaluate.limits import (
    AbsoluteLimit,
    WrittenLimits,
    bound_in_words,
    computed_dense,
    computed_excess,
    resolved_limits,
)
from prunesearch.evaluate.metrics import METRICS
from prunesearch.evaluate.sampling import TooLarge, draw_schedule, improved
from prunesearch.evaluate.shapes import model_shape
from prunesearch.schedule import Schedule
from prunesearch.space.choices import blocks_of, parameters_of

MOST_WORK = 20_000
"""Most schedules tried for one limit, times the blocks of the space. This takes a second or two."""
RANDOM_STARTS, DRAWS = 8, 30
"""Number of random schedules of which the best starts the search, and most draws for each until one is possible."""


def unreachable_limits(space: SpaceConfig, written: WrittenLimits, target: Target, together: bool) -> list[str]:
    """Messages about limits on computed metrics that no schedule of the space can keep.

    Each limit is checked alone. together: check them all at once too. The space, the model and the names of metrics
    must be correct. The schedule nearest to a limit is found by local search, so a limit that only few schedules keep
    could be reported wrongly. This does not happen for costs, which every removed token lowers. When the space is too
    large for the search, there is no message.
    """
    limits = resolved_limits(written, computed_dense(written, target))
    known = [(name, limit) for name, limit in limits if METRICS[name].computed]
    if not known:
        return []
    generator = random.Random(0)
    starts = list(_starts(space, target, generator))
    most, problems = MOST_WORK // max(1, len(blocks_of(space))), []
    for name, limit in known:
        if not starts or (limit.at_most is not None and limit.at_least is not None and limit.at_most < limit.at_least):
            continue
        miss = partial(_miss, name, limit, target)
        try:
            nearest = improved(starts, space, model_shape(target.model), miss, enough=0.0, most=most)
        except TooLarge:
            continue
        value = METRICS[name].of(target, nearest)
        if value is None or limit.excess(value) <= 0:
            continue
        field = "at_most" if limit.at_most is not None and value > limit.at_most else "at_least"
        bound = f"{field} {bound_in_words(getattr(dict(written)[name], field), getattr(limit, field))}"
        problems.append(
            f"limits.{name}: {bound}, and {value:.4g} is the nearest that a schedule of this space comes to it. "
            f"Possible: a limit that some of them keep. Change it, or allow more or other stages."
        )
    if together and not problems:
        try:
            draw_schedule(space, limits, target, generator)
        except StudyError as error:
            problems.append(str(error))
    return problems


def _starts(space: SpaceConfig, target: Target, generator: random.Random) -> Iterator[Schedule]:
    for _ in range(RANDOM_STARTS):
        try:
            schedule = draw_schedule(space, (), target, generator, draws=DRAWS)
        except StudyError:
            return
        if parameters_of(schedule, space) is not None:
            yield schedule


def _miss(name: str, limit: AbsoluteLimit, target: Target, schedule: Schedule) -> float:
    """How far a schedule exceeds a limit; -inf when the metric can only be measured."""
    return computed_excess([(name, limit)], target, schedule).get(name, -math.inf)
