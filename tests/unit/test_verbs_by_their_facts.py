"""Plug-in verbs that do not rank or that pool are treated like ours, by the facts of their registry entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from fake_search import SHAPE

from prunesearch.config import FinetuneConfig, ModelConfig, SpaceConfig
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import build_model
from prunesearch.evaluate.schedule_loss import distills_tokens
from prunesearch.models import apply_schedule
from prunesearch.schedule import Schedule, Stage, resolve
from prunesearch.space.choices import dimensions, parameters_of, schedule_from
from prunesearch.space.problems import space_problems
from prunesearch.tokens import REDUCERS

UNRANKED = [name for name, entry in REDUCERS.items() if not entry.ranks]
POOLING = [name for name, entry in REDUCERS.items() if entry.pools]


@pytest.fixture(autouse=True)
def theirs() -> Iterator[None]:
    """Register each verb again under another name."""
    for name, entry in list(REDUCERS.items()):
        REDUCERS.add(f"their_{name}", replace(entry, name=f"their_{name}"))
    yield
    for name in [name for name in REDUCERS if name.startswith("their_")]:
        del REDUCERS._things[name]


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_a_score_that_is_left_out_follows_the_verb(name: str) -> None:
    ours, theirs = Stage(3, keep=0.5, reduce=name), Stage(3, keep=0.5, reduce=f"their_{name}")
    assert theirs.score == ours.score == ("none" if name in UNRANKED else "class_attention")


def test_there_are_verbs_of_both_kinds() -> None:
    assert {"merge", "pool"} <= set(UNRANKED) and POOLING == ["pool"]


@pytest.mark.parametrize("name", POOLING)
def test_nothing_reads_what_their_verb_pooled(name: str) -> None:
    stages = (Stage(3, tokens=8, reduce=f"their_{name}"), Stage(3, keep=0.5, score="key_norm"))
    with pytest.raises(ScheduleError, match="pooled before"):
        resolve(Schedule(stages), SHAPE)


@pytest.mark.parametrize("name", POOLING)
def test_their_verb_takes_counts_in_a_space(name: str) -> None:
    space = SpaceConfig(blocks=(2, 4), reduce=(f"their_{name}", "drop"), tokens=(8, 16))
    assert space_problems(space, SHAPE) == []
    assert "block2.tokens" in dimensions(space)
    parameters = {"block2.reduce": f"their_{name}", "block2.tokens": 16.0, "block4.keep": 1.0, "block4.reduce": "drop"}
    schedule = schedule_from(parameters, space, SHAPE)
    assert schedule.stages == (Stage(2, tokens=16, reduce=f"their_{name}"),)
    assert parameters_of(schedule, space) is not None
    (problem,) = space_problems(replace(space, reduce=("drop",)), SHAPE)
    assert f"their_{name}" in problem and "space.tokens" in problem


@pytest.mark.parametrize("name", POOLING)
def test_pooled_tokens_are_not_compared_with_the_dense_ones(name: str) -> None:
    model = build_model(ModelConfig("vit_digits_patch1_8", options=(("depth", 3),)))
    learned = Stage(0, at="pre", score="predictor", keep=0.6)
    for last, expected in ((Stage(1, keep=0.5), True), (Stage(1, tokens=8, reduce=f"their_{name}"), False)):
        apply_schedule(model, Schedule((learned, last)), untrained=True)
        assert distills_tokens(model, FinetuneConfig()) is expected
