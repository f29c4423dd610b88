"""Sampler token_gp: its features of a schedule, what it learns, and its reproducibility."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from fake_search import SHAPE, SPACE, study

from prunesearch.config import TARGETS, IsoBudget, Limit, SpaceConfig, StudyConfig, ThresholdRange
from prunesearch.cost import estimate_cost
from prunesearch.front import hypervolume
from prunesearch.samplers import SAMPLERS, ProposerSettings, token_gp
from prunesearch.samplers.propose import build, seed_of
from prunesearch.samplers.token_gp import TokenModel, features
from prunesearch.schedule import Schedule, Stage
from prunesearch.space.choices import Value, any_value, dimensions

REFERENCE = np.array([0.8, 0.013])


def new_model(config: StudyConfig, seen: dict[str, object] | None = None) -> TokenModel:
    return TokenModel(
        ProposerSettings(
            SAMPLERS["token_gp"],
            10,
            config.space,
            config.objectives,
            config.limits,
            config.target,
            SHAPE,
            build=partial(build, config, SHAPE),
            seen={} if seen is None else seen,
        )
    )


def losses(schedule: Schedule, noise: float = 0.0) -> tuple[float, float]:
    """Earlier stages hurt more, and class attention hurts less; cost is the real one."""
    damage = sum(
        (1 - (stage.keep or 1)) / (1 + stage.block) * (1.0 if stage.score == "class_attention" else 1.5)
        for stage in schedule.stages
    )
    return damage + noise, estimate_cost(SHAPE, schedule).gmacs


def told(
    model: TokenModel, config: StudyConfig, parameters: dict[str, Value], noise: float = 0.0
) -> tuple[str, tuple[float, float]]:
    built = build(config, SHAPE, parameters)
    assert built is not None
    uid, schedule = built
    damage, gmacs = losses(schedule, noise)
    model.add(uid, parameters)
    model.tell(uid, (100 * (1 - damage), gmacs), {})
    return uid, (damage, gmacs)


def search(config: StudyConfig, count: int, seed: int, learns: bool) -> float:
    """Hypervolume of the noise-free values after a search with noisy evaluations."""
    seen: dict[str, object] = {}
    model, generator = new_model(config, seen), random.Random(seed)
    found: list[tuple[float, float]] = []
    space = dimensions(config.space)
    while len(found) < count:
        anything = {name: any_value(dimension, generator) for name, dimension in space.items()}
        parameters = model.draw(seed_of(seed, len(found))) if learns and len(found) >= 10 else anything
        uid, (damage, gmacs) = told(model, config, parameters, noise := generator.gauss(0, 0.02))
        seen[uid] = None
        found.append((damage - noise, gmacs))
    return hypervolume(np.array(found), REFERENCE)


@pytest.mark.slow
def test_it_learns_more_from_noisy_results_than_chance_gives() -> None:
    pairs = [(search(study(), 40, seed, True), search(study(), 40, seed, False)) for seed in range(4)]
    assert all(learned > chance for learned, chance in pairs)


def test_a_schedule_is_what_it_does_to_the_tokens() -> None:
    early = features(Schedule((Stage(2, keep=0.5),)), SHAPE)
    assert [early[f"after {block}"] for block in range(4)] == [1.0, 1.0, 0.5, 0.5]
    assert early["reduce drop"] == early["at mid"] == pytest.approx(math.log(2))
    counted = features(Schedule((Stage(2, keep=None, tokens=32),)), SHAPE)
    assert counted == early  # 64 patch tokens, so that both are the same schedule
    for target in TARGETS:
        adaptive = Schedule((Stage(2, score="key_norm", keep=None, threshold=0.01),), **{target: 0.006})
        assert features(adaptive, SHAPE)["threshold 2 drop"] == pytest.approx(-math.log(0.01))
        assert features(adaptive, SHAPE)[target] == 0.006


def test_the_same_results_give_the_same_proposal_however_it_was_asked_before() -> None:
    config, generator = study(), random.Random(0)
    space = dimensions(SPACE)
    settings = [{name: any_value(dimension, generator) for name, dimension in space.items()} for _ in range(20)]
    asked, fresh = new_model(config), new_model(config)
    for index, parameters in enumerate(settings):
        told(asked, config, parameters)
        asked.draw(index)
        told(fresh, config, parameters)
    assert asked.draw(5) == asked.draw(5) == fresh.draw(5)
    assert fresh.draw(5) != fresh.draw(6)


def test_nothing_is_proposed_twice_and_what_runs_counts() -> None:
    config, seen = study(), dict[str, object]()
    model, generator = new_model(config, seen), random.Random(0)
    for _ in range(12):
        told(model, config, {name: any_value(one, generator) for name, one in dimensions(SPACE).items()})
    for _ in range(6):  # all with the same seed and still running
        parameters = model.draw(1)
        built = build(config, SHAPE, parameters)
        assert built is not None and built[0] not in seen
        seen[built[0]] = None
        model.add(built[0], parameters)


def test_a_measured_limit_is_learned() -> None:
    """Latency is within its limit below 80 % of the dense MACs."""
    config = replace(study(), limits=(("latency_ms", Limit(at_most=8.0)),))
    model, generator = new_model(config), random.Random(0)
    bound = 0.8 * estimate_cost(SHAPE, Schedule()).gmacs
    for _ in range(30):
        parameters = {name: any_value(one, generator) for name, one in dimensions(SPACE).items()}
        built = build(config, SHAPE, parameters)
        assert built is not None
        damage, gmacs = losses(built[1])
        model.add(built[0], parameters)
        model.tell(built[0], (100 * (1 - damage), gmacs), {"latency_ms": 10 * (gmacs / bound - 1)})
    drawn = [build(config, SHAPE, model.draw(seed)) for seed in range(8)]
    within = [built is not None and estimate_cost(SHAPE, built[1]).gmacs <= bound for built in drawn]
    assert sum(within) >= 6


def test_a_training_that_collapsed_hides_no_differences() -> None:
    values = [0.0, 1.0, 2.0, 3.0, 1000.0]
    assert token_gp._without_outliers(values).tolist() == [0.0, 1.0, 2.0, 3.0, 9.0]
    assert token_gp._without_outliers([1.0, 1.0, 1.0, 1.0, 1000.0]).max() == 1000.0  # no spread to compare with


def test_results_beyond_the_window_are_left_out_but_not_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_gp, "WINDOW", 12)
    config, generator = study(), random.Random(0)
    model = new_model(config)
    best = {name: 1.0 if "keep" in name else "class_attention" for name in dimensions(SPACE)}
    told(model, config, {**best, **{name: "drop" for name in best if "reduce" in name}})  # the dense model
    for _ in range(30):
        told(model, config, {name: any_value(one, generator) for name, one in dimensions(SPACE).items()})
    window = model._window()
    assert len(window) < 31 and window[0].schedule == Schedule()
    assert window[-1] is list(model._results.values())[-1]
    model.draw(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": IsoBudget(0.007)},
        {
            "space": SpaceConfig(
                blocks=(2, 4),
                amount=("threshold", "none"),
                threshold=ThresholdRange(1e-4, 1.0, log=True),
                score=("key_norm",),
                target_gmacs=(0.005, 0.007, 0.01),
            )
        },
    ],
    ids=["budget", "thresholds"],
)
def test_budgets_and_thresholds(changes: dict[str, object]) -> None:
    config = replace(study(), **changes)  # type: ignore[arg-type]
    model, generator = new_model(config), random.Random(0)
    for index in range(16):
        built, parameters = None, dict[str, Value]()
        while built is None:
            space = dimensions(config.space)
            parameters = {name: any_value(one, generator) for name, one in space.items()}
            built = build(config, SHAPE, parameters)
        model.add(str(index), parameters)
        model.tell(str(index), (90.0 - len(built[1].stages), 0.005 + index / 1e4), {})
    assert build(config, SHAPE, model.draw(0)) is not None
