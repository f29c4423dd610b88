"""The next candidate: new, possible, and within every limit that arithmetic can check."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from prunesearch.config import StudyConfig
from prunesearch.errors import ScheduleError
from prunesearch.evaluate.limits import budget_of, computed_excess, computed_limits, is_within
from prunesearch.samplers.iso_budget import within_budget
from prunesearch.samplers.quasi_random import points
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape
from prunesearch.space.choices import (
    Dimension,
    Value,
    anything,
    combination,
    combinations,
    dimensions,
    mutated,
    parameters_of,
    schedule_from,
    uid_of,
)

MUTATIONS = 200
"""Neighbours of earlier suggestions."""
RANDOM_DRAWS = 1000
MOVED, MOVES = 20, 300
"""Random draws that are moved within the limits, and the most changes that are tried with one of them."""
COUNTABLE = 20_000
"""A space of up to this many combinations is exhausted only when each of them has been tried."""


@dataclass(frozen=True)
class Proposal:
    """What was found for the next candidate.

    schedule: None when there is no further candidate. rejected: how many suggestions were turned down before.
    parameters: what the sampler is told of the candidate; with a budget, those of the schedule before it was moved.
    """

    schedule: Schedule | None
    rejected: int
    parameters: dict[str, Value] | None = None


def seed_of(*parts: object) -> int:
    """A seed of 31 bits that depends on nothing but the parts."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def propose(
    config: StudyConfig,
    shape: ModelShape,
    draw: Callable[[int], dict[str, Value]],
    draws: int,
    known: Sequence[dict[str, Value]],
    seen: Container[str],
    index: int,
) -> Proposal:
    """The index-th candidate of a study.

    draw: asks the sampler with a seed, at most `draws` times. known: parameters of earlier candidates. seen: uids of
    earlier candidates. When the sampler has only repeated itself, or suggested what is beyond the limits, neighbours of
    its suggestions are tried, then random parameters that are moved within the limits, then as they are drawn, then, in
    a small space, all combinations. The same arguments give the same candidate.
    """
    rejected = 0
    repeated: list[dict[str, Value]] = []
    for parameters in _suggestions(config, shape, draw, draws, repeated, known, index):
        built = build(config, shape, parameters)
        if built is not None:
            uid, schedule = built
            if uid not in seen:
                suggested = schedule_from(parameters, config.space, shape)
                return Proposal(schedule, rejected, parameters_of(suggested, config.space))
            repeated.append(parameters)
        rejected += 1
    return Proposal(None, rejected)


def build(config: StudyConfig, shape: ModelShape, parameters: Mapping[str, Value]) -> tuple[str, Schedule] | None:
    """Uid and schedule of the candidate that these values stand for. None when they do not go together, cannot be moved
    onto the budget, or break a limit on a metric that arithmetic gives."""
    try:
        schedule = schedule_from(parameters, config.space, shape)
        budget = budget_of(config)
        if budget is not None:
            schedule = within_budget(schedule, shape, budget)
        if not is_within(computed_limits(config), config.target, schedule):
            return None
        return uid_of(schedule, shape), schedule
    except ScheduleError:
        return None


def _suggestions(
    config: StudyConfig,
    shape: ModelShape,
    draw: Callable[[int], dict[str, Value]],
    draws: int,
    repeated: Sequence[dict[str, Value]],
    known: Sequence[dict[str, Value]],
    index: int,
) -> Iterator[dict[str, Value]]:
    """Parameters to try, in this order, until some are a new candidate.

    repeated: suggestions that were candidates before; the caller adds to it while this runs.
    """
    space, sampler = config.space, config.sampler
    ranges, seed = dimensions(space), sampler.seed
    yield from points(sampler, space, len(known))
    for attempt in range(draws):
        yield draw(seed_of(seed, index, attempt))
    generator = random.Random(seed_of(seed, index, "neighbours"))
    start = tuple(repeated) or known
    if start and ranges:
        for _ in range(MUTATIONS):
            yield mutated(generator.choice(start), ranges, generator)
    yield from _moved_within(config, shape, ranges, generator)
    for _ in range(RANDOM_DRAWS):
        yield anything(ranges, generator)
    total = combinations(space)
    if total is not None and total <= COUNTABLE:
        for position in generator.sample(range(total), total):
            yield combination(space, position)


def _moved_within(
    config: StudyConfig, shape: ModelShape, ranges: Mapping[str, Dimension], generator: random.Random
) -> Iterator[dict[str, Value]]:
    """Random parameters, changed step by step until their schedule keeps the limits that arithmetic can check.

    In a space of which only few schedules keep them, random draws alone would find none.
    """
    limits = computed_limits(config)
    if not limits or not ranges:
        return

    def miss(parameters: Mapping[str, Value]) -> float:
        try:
            schedule = schedule_from(parameters, config.space, shape)
            return sum(max(amount, 0.0) for amount in computed_excess(limits, config.target, schedule).values())
        except ScheduleError:
            return math.inf

    for _ in range(MOVED):
        parameters = anything(ranges, generator)
        missed = miss(parameters)
        for _ in range(MOVES):
            if missed <= 0:
                break
            other = mutated(parameters, ranges, generator)
            if (found := miss(other)) <= missed:
                parameters, missed = other, found
        if missed <= 0:
            yield parameters
