"""Candidates within limits that few schedules of a space keep."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from fake_search import SHAPE, SPACE, study

from prunesearch.config import Limit
from prunesearch.cost import estimate_cost
from prunesearch.samplers.propose import propose
from prunesearch.space.choices import anything, dimensions, uid_of


@pytest.mark.parametrize("seed", range(4))
def test_a_limit_that_few_schedules_keep_is_kept(seed: int) -> None:
    """Among random schedules of this space, hardly any costs so little; candidates come all the same."""
    space = replace(SPACE, keep=(0.5, 0.9, 1.0), until=("never", "next", "end"))
    config = replace(study(seed=seed, space=space), limits=(("gmacs", Limit(at_most="52%")),))
    dense, ranges = estimate_cost(SHAPE).gmacs, dimensions(space)
    generator = random.Random(seed)
    drawn = [anything(ranges, generator) for _ in range(2000)]
    seen: set[str] = set()
    for index in range(6):
        found = propose(config, SHAPE, lambda seed: drawn[seed % 2000], 4, [], seen, index)
        assert found.schedule is not None, f"{found.rejected} suggestions were rejected"
        assert estimate_cost(SHAPE, found.schedule).gmacs <= 0.52 * dense
        seen.add(uid_of(found.schedule, SHAPE))
    assert len(seen) == 6


def test_what_no_schedule_keeps_ends_soon() -> None:
    config = replace(study(), limits=(("gmacs", Limit(at_most="5%")),))
    ranges = dimensions(config.space)
    found = propose(config, SHAPE, lambda seed: anything(ranges, random.Random(seed)), 4, [], set(), 0)
    assert found.schedule is None and found.rejected > 1000
