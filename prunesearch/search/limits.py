"""The limits of a study: by how much a value breaks one, and what arithmetic knows before anything is trained."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from prunesearch.config import Limit, ModelConfig, StudyConfig
from prunesearch.errors import StudyError
from prunesearch.evaluate import METRICS, model_shape
from prunesearch.evaluate.draw import STARTS, draw_schedule, improved
from prunesearch.evaluate.metrics import Compute
from prunesearch.evaluate.task import SupernetWork
from prunesearch.schedule import Schedule


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
    be taken for one that none keeps; costs, which every removed token lowers, are not of that kind.
    """
    shape, problems = model_shape(config.model), []
    generator, anything = random.Random(0), SupernetWork(config.space, schedules=1, images=0)
    try:
        starts = [draw_schedule(anything, config.model, generator) for _ in range(STARTS)]
    except StudyError:  # no schedule at all comes out of so many draws; the search will say more
        return []
    for name, limit in config.limits:
        compute = METRICS[name].compute
        if compute is None:
            continue
        nearest = improved(starts, config.space, shape, partial(_miss, compute, config.model, limit), enough=0.0)
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


def _miss(compute: Compute, model: ModelConfig, limit: Limit, schedule: Schedule) -> float:
    """By how much a schedule breaks a limit; of what only images tell, not at all."""
    value = compute(model, schedule)
    return -math.inf if value is None else limit.excess(value)
