"""The limits of a study: by how much a value breaks one, and what arithmetic knows before anything is trained."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from prunesearch.config import Limit, ModelConfig, StudyConfig
from prunesearch.errors import StudyError
from prunesearch.evaluate.metrics import METRICS, Compute
from prunesearch.evaluate.sampling import TooLarge, draw_schedule, improved
from prunesearch.evaluate.shapes import model_shape
from prunesearch.evaluate.task import SupernetWork
from prunesearch.schedule import Schedule
from prunesearch.space.choices import blocks_of, parameters_of

MOST_WORK = 20_000
"""Blocks of a space times schedules that are looked at for a limit, which take a second or two."""
RANDOM_STARTS, DRAWS = 8, 30
"""Random schedules from the best of which the search begins, and how often each is drawn until it is a possible one."""


def excess(config: StudyConfig, values: Mapping[str, float]) -> dict[str, float]:
    """By how much each limited metric that has a value breaks its limit, in the metric's unit; 0 or less is within."""
    found: dict[str, float] = {}
    for name, limit in config.limits:
        if name in values:
            found[name] = limit.excess(values[name])
    return found


def total_excess(config: StudyConfig, values: Mapping[str, float]) -> float:
    """By how much all limits together are broken, each as a share of its bound; 0 is within all of them."""
    total = 0.0
    for name, amount in excess(config, values).items():
        limit = dict(config.limits)[name]
        bound = limit.at_most if limit.at_most is not None else limit.at_least
        total += max(amount, 0.0) / (abs(bound or 0.0) or 1.0)
    return total


def computed_excess(config: StudyConfig, schedule: Schedule) -> dict[str, float]:
    """The same for the metrics that arithmetic gives. Raises ScheduleError when the schedule does not fit the model."""
    values = {}
    for name, _ in config.limits:
        compute = METRICS[name].compute
        value = None if compute is None else compute(config.model, schedule)
        if value is not None:
            values[name] = value
    return excess(config, values)


def unreachable_limits(config: StudyConfig) -> list[str]:
    """What to say about limits that arithmetic knows and that no schedule of the space can keep, each for itself; with
    shared weights also all together. The space, the model and the names of metrics must be without mistakes.

    The schedule nearest to a limit is found by local search, so a limit that only a few of many schedules keep could
    be taken for one that none keeps; costs, which every removed token lowers, are not of that kind. Where the space is
    too large for the search, nothing is said.
    """
    known = [(name, limit, METRICS[name].compute) for name, limit in config.limits if METRICS[name].compute is not None]
    if not known:
        return []
    generator, anything = random.Random(0), SupernetWork(config.space, schedules=1, images=0)
    starts = list(_starts(anything, config.model, generator))
    most, problems = MOST_WORK // max(1, len(blocks_of(config.space))), []
    for name, limit, compute in known:
        assert compute is not None
        if not starts or (limit.at_most is not None and limit.at_least is not None and limit.at_most < limit.at_least):
            continue
        miss = partial(_miss, compute, config.model, limit)
        try:
            nearest = improved(starts, config.space, model_shape(config.model), miss, enough=0.0, most=most)
        except TooLarge:
            continue
        value = compute(config.model, nearest)
        if value is None or limit.excess(value) <= 0:
            continue
        is_over = limit.at_most is not None and value > limit.at_most
        bound = f"at_most {limit.at_most:g}" if is_over else f"at_least {limit.at_least:g}"
        problems.append(
            f"limits.{name}: {bound}, and {value:.4g} is the nearest that a schedule of this space comes to it. "
            f"Possible: a limit that some of them keep. Change it, or allow more or other stages."
        )
    if config.evaluation == "supernet" and not problems:
        try:
            draw_schedule(replace(anything, limits=config.limits), config.model, generator)
        except StudyError as error:
            problems.append(str(error))
    return problems


def _starts(anything: SupernetWork, model: ModelConfig, generator: random.Random) -> Iterator[Schedule]:
    for _ in range(RANDOM_STARTS):
        try:
            schedule = draw_schedule(anything, model, generator, draws=DRAWS)
        except StudyError:
            return
        if parameters_of(schedule, anything.space) is not None:
            yield schedule


def _miss(compute: Compute, model: ModelConfig, limit: Limit, schedule: Schedule) -> float:
    """By how much a schedule breaks a limit; of what only images tell, not at all."""
    value = compute(model, schedule)
    return -math.inf if value is None else limit.excess(value)
