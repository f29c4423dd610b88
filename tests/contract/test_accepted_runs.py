"""Promise: a study that `check` accepts proposes candidates with every sampler, and `check` always ends soon."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from fuzz_check import CANDIDATES, DIGITS, MOST_SECONDS, check, peak_megabytes, proposals, run

from prunesearch.config import (
    BlockSpace,
    IsoBudget,
    Limit,
    Objective,
    Range,
    SamplerConfig,
    SpaceConfig,
    StudyConfig,
    ThresholdRange,
)
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import model_shape
from prunesearch.files import write_yaml
from prunesearch.samplers import SAMPLERS
from prunesearch.samplers.token_gp import features
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.problems import study_problems
from prunesearch.space.choices import dimensions
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.tokens import REDUCERS, SCORERS

SPACES_EACH = {name: 2 if SAMPLERS[name].most_trials else 8 for name in SAMPLERS}
"""Number of random spaces for each sampler. Slow samplers take seconds per space, so they get fewer."""


def some(values: Any, generator: random.Random) -> tuple[Any, ...]:
    values = list(values)
    return tuple(generator.sample(values, generator.randint(1, min(3, len(values)))))


def random_space(generator: random.Random) -> SpaceConfig:
    """A random space with each field within its bounds. Many of these spaces are refused as a whole."""
    keep: Any = generator.choice(
        [
            some((0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0), generator),
            (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
            Range(0.2, 1.0),
            Range(0.3, 0.9, 0.1),
            Range(0.5, 0.5),
            (1e-300, 1.0),
        ]
    )
    amount = some(("keep", "threshold", "none"), generator)
    by_threshold = "threshold" in amount or generator.random() < 0.1
    threshold: Any = by_threshold and generator.choice(
        [(0.0, 0.01), (0.02,), (1e6, 5e-324), ThresholdRange(0, 0.1), ThresholdRange(1e-9, 0.1, log=True), None]
    )
    merge: Any = by_threshold and generator.choice(
        [(-1.0, 0.9), (0.0,), (0.7, 0.8, 0.9), ThresholdRange(-0.5, 1.0), ThresholdRange(0.5, 0.9, log=True), None]
    )
    blocks: list[Any] = generator.sample(range(8), generator.randint(1, 6))
    if generator.random() < 0.4:
        own = generator.choice(
            [{"keep": (0.5,)}, {"reduce": ("merge",)}, {"amount": ("none", "keep")}, {"at": ("pre",)}]
        )
        blocks[0] = BlockSpace(blocks[0], **own)
    return SpaceConfig(
        blocks=tuple(blocks),
        keep=keep,
        at=some(("mid", "pre"), generator),
        score=some(SCORERS, generator),
        reduce=some(REDUCERS, generator),
        amount=amount,
        threshold=threshold or None,
        merge_threshold=merge or None,
        tokens=generator.choice([None, (1, 64), (4, 8, 16)]),
        target_gmacs=generator.choice([None, (0.005, 0.01), ThresholdRange(0.006, 0.012)]) if by_threshold else None,
        same=() if generator.random() < 0.6 else some(("at", "score", "reduce", "keep", "amount"), generator),
        max_stages=generator.choice([None, 1, 3, 1000]),
    )


def random_study(sampler: str, generator: random.Random) -> StudyConfig:
    objectives = generator.choice(
        [("top1", "gmacs"), ("top1",), ("gmacs",), ("top1", "gmacs", "throughput"), ("loss", "parameters")]
    )
    return StudyConfig(
        version=1,
        name="random",
        model=DIGITS,
        space=random_space(generator),
        objectives=tuple(
            Objective(name, "maximize" if name in ("top1", "throughput") else "minimize") for name in objectives
        ),
        limits=generator.choice([(), (("gmacs", Limit(at_most=0.011)),), (("top1", Limit(at_least=50.0)),)]),
        budget=generator.choice([None, None, None, IsoBudget(0.009)]),
        sampler=SamplerConfig(
            sampler, seed=generator.choice([0, 7, 2**63 - 1]), startup=generator.choice([None, 0, 3])
        ),
    )


@pytest.mark.parametrize(
    "sampler", [name if name in ("auto", "random") else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
)
def test_a_space_without_mistakes_proposes_candidates(sampler: str) -> None:
    generator = random.Random(f"spaces of {sampler}")
    accepted = proposed = 0
    for _ in range(2000):
        config = random_study(sampler, generator)
        if study_problems(config):
            continue
        is_slow = SAMPLERS[sampler].most_trials is not None
        if is_slow and len(dimensions(config.space)) > 8:
            continue
        proposed += proposals(config, CANDIDATES // 2 if is_slow else CANDIDATES) > 0
        accepted += 1
        if accepted == SPACES_EACH[sampler]:
            break
    assert accepted == SPACES_EACH[sampler] and proposed >= accepted / 2  # limits may exclude everything


@pytest.mark.parametrize("threshold", [0.0, -0.0, 5e-324, 1e-12, 0.5, 1.0, 1e6, -1e-9, -0.5, -1.0, -1e6])
def test_every_schedule_that_fits_has_features(threshold: float) -> None:
    """Learned thresholds may be negative."""
    shape, fitting = model_shape(DIGITS), 0
    for score, reduce in itertools.product([*SCORERS, "none"], REDUCERS):
        schedule = Schedule((Stage(3, score=score, reduce=reduce, threshold=threshold),))
        try:
            found = features(schedule, shape)
        except ScheduleError:
            continue
        fitting += 1
        assert all(abs(value) < 1e7 for value in found.values())
    assert fitting > len(SCORERS)


def test_features_order_thresholds() -> None:
    shape = model_shape(DIGITS)
    name = "threshold 3 merge"
    found = [
        features(Schedule((Stage(3, reduce="merge", threshold=value),)), shape)[name]
        for value in (-1.0, -0.2, 0, 0.1, 0.9)
    ]
    assert found == sorted(found, reverse=True) and len(set(found)) == 5


WRONG_SPACES: dict[str, tuple[dict[str, Any], str]] = {
    "negative threshold": ({"threshold": (-0.1, 0.2), "amount": ("threshold", "none")}, "space.threshold"),
    "negative range": ({"threshold": ThresholdRange(-1, 1), "amount": ("threshold", "none")}, "threshold: low is -1"),
    "cosine above 1": ({"merge_threshold": (1.5,), "amount": ("threshold",), "reduce": ("merge",)}, "merge_threshold"),
    "cosine range": (
        {"merge_threshold": ThresholdRange(0.5, 2), "amount": ("threshold",), "reduce": ("merge",)},
        "high is 2; possible: from -1 up to 1",
    ),
    "a million steps": ({"keep": Range(0.1, 1.0, 0.0011)}, "818 steps of 0.0011; possible: up to 200"),
    "steps of nothing": ({"keep": Range(0.1, 1.0, 1e-6)}, "space.keep.step: is 1e-06; possible: a number from 0.001"),
    "many values": ({"keep": tuple(index / 1000 for index in range(1, 900))}, "space.keep: has 899 items"),
    "many starts": ({"start_from": ("evit-0.7",) * 1000}, "space.start_from: has 1,000 items"),
    "many blocks": ({"blocks": tuple(range(5000))}, "space.blocks: has 5,000 items"),
    "too many stages": (
        {"keep": (0.5,), "max_stages": 2},
        "space.max_stages: 2, but blocks 1, 2, 3 always have a stage",
    ),
    "target above dense": (
        {"amount": ("threshold",), "threshold": (0.01,), "target_gmacs": ThresholdRange(0.001, 5)},
        "space.target_gmacs",
    ),
}


@pytest.mark.parametrize(("changes", "says"), WRONG_SPACES.values(), ids=WRONG_SPACES)
def test_a_space_that_could_not_run_is_refused(changes: dict[str, Any], says: str) -> None:
    space = SpaceConfig(**{"blocks": (1, 2, 3), "keep": (0.5, 1.0), **changes})
    problems = study_problems(StudyConfig(1, "x", DIGITS, space))
    assert any(says in problem for problem in problems), problems


def test_limits_that_exclude_each_other_are_refused() -> None:
    space = SpaceConfig(blocks=(1,))
    limits = (("gmacs", Limit(at_most=1.0, at_least=2.0)), ("top1", Limit()))
    problems = study_problems(StudyConfig(1, "x", DIGITS, space, limits=limits))
    assert len(problems) == 2 and "at_most 1 is below at_least 2" in problems[0] and "has no bound" in problems[1]


def test_a_study_made_in_python_is_held_to_the_bounds_of_a_file() -> None:
    config = StudyConfig(1, "x", DIGITS, SpaceConfig(blocks=(1,)), sampler=SamplerConfig(seed=-1))
    assert study_problems(config) == [
        "sampler.seed: is -1; possible: a whole number from 0 up to 9,223,372,036,854,775,807."
    ]
    assert from_mapping(StudyConfig, to_mapping(StudyConfig(1, "x", DIGITS, SpaceConfig((1,)))), "x")


VERBS = [name for name, verb in REDUCERS.items() if not verb.holds and verb.masked is not None]
LARGE = {
    "blocks": list(range(1, 100)),
    "keep": [round(0.5 + index / 400, 4) for index in range(200)],
    "at": ["mid", "pre"],
    "score": [name for name, score in SCORERS.items() if score.part is None],
    "reduce": VERBS,
}
OWN = {name: values for name, values in LARGE.items() if name != "blocks"}
LARGEST: dict[str, dict[str, Any]] = {
    "lists": {"space": LARGE},
    "thresholds": {
        "space": {
            **LARGE,
            "amount": ["keep", "threshold", "none"],
            "threshold": [index / 1000 for index in range(1, 201)],
            "merge_threshold": [index / 1000 for index in range(200)],
            "tokens": list(range(1, 65)),
        }
    },
    "blocks of their own": {"space": {**LARGE, "blocks": [{**OWN, "block": index} for index in range(1, 30)]}},
    "starts": {"space": {**LARGE, "start_from": ["tome-r8", "evit-0.7", "asvit-0.65", "ltmp-0.6", "dtps-0.5"] * 20}},
    "budget": {"space": {**LARGE, "keep": [0.5, 0.7, 1.0]}, "budget": {"gmacs": 0.08}},
    "sensitivity": {"space": {**LARGE, "start_from": ["sensitivity"]}},
}
for place in ("lists", "thresholds", "blocks of their own"):
    LARGEST[f"{place}, limits"] = {**LARGEST[place], "limits": {"gmacs": {"at_most": 1e-6}}}
LARGEST["few stages, limits"] = {"space": {**LARGE, "max_stages": 3}, "limits": {"gmacs": {"at_most": 1e-6}}}


@pytest.mark.parametrize("changes", LARGEST.values(), ids=LARGEST)
def test_the_largest_studies_are_checked_in_time(changes: dict[str, Any], tmp_path: Path) -> None:
    model = {"name": DIGITS.name, "options": {"depth": 100}}
    write_yaml({"version": 1, "name": "large", "model": model, **changes}, tmp_path / "study.yaml")
    outcome = check(tmp_path / "study.yaml")
    assert outcome.where in ("accepted", "meaning") and outcome.seconds < MOST_SECONDS, outcome


def test_a_file_cannot_hurt(tmp_path: Path) -> None:
    before = peak_megabytes()
    outcomes = run(200, seed=1, folder=tmp_path)
    assert [outcome.trouble for outcome in outcomes if outcome.trouble] == []
    meant = sum(outcome.where in ("meaning", "accepted") for outcome in outcomes)
    # of 3,000 files at least half come so far; a sample of 200 may have a few less
    assert len(outcomes) == 200 and meant >= 90 and peak_megabytes() - before < 1000
    assert sum(outcome.proposed == CANDIDATES for outcome in outcomes) >= 5
