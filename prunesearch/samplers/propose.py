"""The next candidate: new, possible, and within every limit that arithmetic can check."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from prunesearch.config import StudyConfig
from prunesearch.errors import ScheduleError
from prunesearch.evaluate.limits import computed_excess
from prunesearch.samplers.iso_budget import within_budget
from prunesearch.samplers.quasi_random import points
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape
from prunesearch.space.choices import (
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
RANDOM_DRAWS = 1000
COUNTABLE = 20_000
"""Spaces of up to this many combinations are searched to the last one."""


@dataclass(frozen=True)
class Proposal:
    """A candidate, or None when there is no further one, and how many were turned down on the way.

    parameters: what the sampler has to learn of it. With a budget another schedule than this one stands for them.
    """

    schedule: Schedule | None
    rejected: int
    parameters: dict[str, Value] | None = None


def seed_of(*parts: object) -> int:
    """31 bits that depend on nothing but the parts."""
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

    draw: asks the sampler with a seed, at most `draws` times. known: parameters of earlier candidates. seen: uids that
    were candidates before. When the sampler only repeats itself, neighbours of what it wants are tried, then anything.
    The same arguments give the same candidate.
    """
    rejected = 0
    repeated: list[dict[str, Value]] = []
    for parameters in _stream(config, draw, draws, repeated, known, index):
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
    """Uid and schedule of the candidate that these values stand for; None when they do not go together, cannot come to
    the budget, or break a limit that arithmetic knows."""
    try:
        schedule = schedule_from(parameters, config.space, shape)
        if config.budget is not None:
            schedule = within_budget(schedule, shape, config.budget.gmacs)
        if any(amount > 0 for amount in computed_excess(config, schedule).values()):
            return None
        return uid_of(schedule, shape), schedule
    except ScheduleError:
        return None


def _stream(
    config: StudyConfig,
    draw: Callable[[int], dict[str, Value]],
    draws: int,
    repeated: Sequence[dict[str, Value]],
    known: Sequence[dict[str, Value]],
    index: int,
) -> Iterator[dict[str, Value]]:
    space = dimensions(config.space)
    seed = config.sampler.seed
    yield from points(config, len(known))
    for attempt in range(draws):
        yield draw(seed_of(seed, index, attempt))
    generator = random.Random(seed_of(seed, index, "neighbours"))
    start = tuple(repeated) or known
    if start and space:
        for _ in range(MUTATIONS):
            yield mutated(generator.choice(start), space, generator)
    for _ in range(RANDOM_DRAWS):
        yield anything(space, generator)
    total = combinations(config.space)
    if total is not None and total <= COUNTABLE:
        for position in generator.sample(range(total), total):
            yield combination(config.space, position)
