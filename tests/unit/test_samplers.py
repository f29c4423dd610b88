"""Samplers: their proposals in a model study, and how new candidates are found when they repeat themselves."""

from __future__ import annotations

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
from dying import Killed, die_at
from fake_search import EVALUATED, SHAPE, SPACE, records, run, small_study, study
from optuna.distributions import FloatDistribution

from prunesearch.config import (
    TARGETS,
    Limit,
    Objective,
    Range,
    SamplerConfig,
    SpaceConfig,
    ThresholdRange,
)
from prunesearch.errors import UnknownNameError
from prunesearch.samplers import SAMPLERS, Proposer, ProposerSettings, Sampler, from_optuna, quasi_random, token_gp
from prunesearch.samplers.optuna_samplers import ModelStudy
from prunesearch.samplers.propose import build, propose, seed_of
from prunesearch.samplers.proposer import Handover, in_charge
from prunesearch.space.choices import Choice, Value, anything, dimensions, parameters_of, schedule_from, uid_of

OBJECTIVES = (Objective("top1", "maximize"), Objective("gmacs", "minimize"))


def proposer(sampler: Sampler, startup: int | None = None, space: SpaceConfig = SPACE) -> Proposer:
    config = study(space=space, objectives=OBJECTIVES)
    return sampler.make(
        ProposerSettings(
            sampler,
            max(sampler.startup if startup is None else startup, sampler.least_startup),
            space,
            OBJECTIVES,
            config.limits,
            config.target,
            SHAPE,
            build=partial(build, config, SHAPE),
            seen=(),
        )
    )


def model(name: str, startup: int | None = None, **changes: Any) -> ModelStudy:
    found = proposer(replace(SAMPLERS[name], **changes), startup)
    assert isinstance(found, ModelStudy)
    return found


OPTUNAS = [name for name, sampler in SAMPLERS.items() if isinstance(proposer(sampler), ModelStudy)]


def trials(study: ModelStudy) -> list[optuna.trial.FrozenTrial]:
    study._memory.visible = None
    return [trial for trial in study._study.get_trials() if trial.state != optuna.trial.TrialState.FAIL]


def quality(parameters: dict[str, Value]) -> tuple[float, float]:
    """A made-up trade-off: (to maximise, to minimise)."""
    keeps = [float(parameters[f"block{block}.keep"]) for block in range(1, 6)]
    return keeps[0] - 0.1 * sum(keeps[1:]), sum(keeps)


def grow(study: ModelStudy, count: int, first: int = 0) -> None:
    for index in range(first, first + count):
        parameters = study.draw(seed_of(index))
        study.add(str(index), parameters)
        study.tell(str(index), quality(parameters), {})


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_runs_30_candidates(tmp_path: Path, name: str) -> None:
    EVALUATED.clear()
    config = study(30, name)
    if name == "gp":  # each of its proposals takes almost a second
        config = replace(config, stop=replace(config.stop, trials=12), space=replace(SPACE, blocks=(2, 4)))
    done, _ = run(config, tmp_path)
    assert done.complete == len(records(tmp_path)) == len(set(EVALUATED)) == config.stop.trials


class LastFirst:
    """A custom sampler that proposes the last candidate again, so that neighbours are tried."""

    def __init__(self, settings: ProposerSettings) -> None:
        self.space, self.last = dimensions(settings.space), dict[str, Value]()
        self.told = list[str]()

    def add(self, uid: str, parameters: Mapping[str, Value]) -> None:
        self.last = dict(parameters)

    def tell(self, uid: str, values: Sequence[float] | None, excess: Mapping[str, float]) -> None:
        assert values is not None and len(values) == len(OBJECTIVES)
        self.told.append(uid)

    def draw(self, seed: int) -> dict[str, Value]:
        return self.last or anything(self.space, random.Random(seed))


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_sampler_is_added_with_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LastFirst] = []

    def make(settings: ProposerSettings) -> Proposer:
        made.append(LastFirst(settings))
        return made[-1]

    for sampler in (
        Sampler("last_first", "its last candidate again", make, draws=1),
        Sampler("nsga3", "NSGA-III", from_optuna("NSGAIIISampler", "population_size"), counts_generations=True),
    ):
        monkeypatch.setitem(SAMPLERS._things, sampler.name, sampler)
        run(study(14, sampler.name), tmp_path / sampler.name)
        assert len(records(tmp_path / sampler.name)) == 14
    assert made[-1].told == [record.uid for record in records(tmp_path / "last_first")]
    grow(grown := model("nsga3", startup=4), 12)
    assert [trial.system_attrs["NSGAIIISampler:generation"] for trial in trials(grown)] == [i // 4 for i in range(12)]


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_a_sampler_that_learns_is_better_than_chance(name: str) -> None:
    study = model(name, startup=10)
    grow(study, 60)
    best = [trial.values[0] for trial in trials(study)]
    assert sum(best[40:]) / 20 > sum(best[:10]) / 10 + 0.05


def test_the_space_is_complete_and_exact_in_every_proposal() -> None:
    for name in OPTUNAS:
        study = model(name)
        grow(study, 12)
        parameters = study.draw(7)
        assert list(parameters) == list(dimensions(SPACE)), name
        assert study.draw(7) == parameters, name  # drawing does not change the state
        if name != "gp":  # its optimum hardly depends on the seed
            assert study.draw(8) != parameters, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", OPTUNAS)
def test_thresholds_are_looked_at_as_ratios(name: str, target: str) -> None:
    space = SpaceConfig(
        blocks=(2, 4),
        amount=("threshold", "none"),
        threshold=ThresholdRange(1e-4, 1.0, log=True),
        score=("key_norm",),
        **{target: (0.005, 0.007, 0.01)},
    )
    candidates = []
    for _ in range(2):
        study = proposer(SAMPLERS[name], 8, space)
        assert isinstance(study, ModelStudy)
        assert study._distributions["block2.threshold"] == FloatDistribution(1e-4, 1.0, log=True)
        drawn = []
        for index in range(12 if name == "gp" else 24):
            schedule = schedule_from(study.draw(seed_of(index)), space, SHAPE)
            parameters = parameters_of(schedule, space)
            assert parameters is not None
            study.add(str(index), parameters)
            study.tell(str(index), (float(len(schedule.stages)), sum(s.threshold or 0 for s in schedule.stages)), {})
            drawn.append(schedule)
        candidates.append(drawn)
    assert candidates[0] == candidates[1]
    found = [stage.threshold for schedule in candidates[0] for stage in schedule.stages if stage.threshold]
    assert sum(threshold < 0.01 for threshold in found) >= len(found) / 4 and max(found) > 0.01


def test_mutations_and_random_values_of_thresholds_are_ratios_too() -> None:
    space = SpaceConfig(blocks=(2,), amount=("threshold",), threshold=ThresholdRange(1e-4, 1.0, log=True))
    found: dict[str, float] = {}
    for index in range(60):
        proposal = propose(study(space=space), SHAPE, lambda seed: {}, 1, [], found, index)
        assert proposal.schedule is not None
        found[uid_of(proposal.schedule, SHAPE)] = proposal.schedule.stages[0].threshold or 0.0
    assert 18 <= sum(threshold < 0.01 for threshold in found.values()) <= 42
    assert len(set(found.values())) == 60 and min(found.values()) >= 1e-4


def test_nsga2_sees_its_generations() -> None:
    study = model("nsga2", startup=8)
    grow(study, 30)
    assert [trial.system_attrs["NSGAIISampler:generation"] for trial in trials(study)] == [
        index // 8 for index in range(30)
    ]
    parents = [key for key in study._memory.get_study_system_attrs(0) if "parent" in key]
    assert parents == ["NSGAIISampler:parent:1", "NSGAIISampler:parent:2", "NSGAIISampler:parent:3"]


def test_tpe_looks_at_the_front_the_latest_and_what_runs() -> None:
    study = model("tpe", startup=3, window=5)
    settings = [{name: 0.5 if "keep" in name else "drop" for name in dimensions(SPACE)} for _ in range(20)]
    for parameters in settings:
        parameters.update({name: "key_norm" for name in parameters if "score" in name})
    values = [(90.0, 1.0), (80.0, 2.0), (70.0, 0.5), *[(10.0, 3.0)] * 16]
    for index, (parameters, value) in enumerate(zip(settings, values, strict=False)):
        study.add(str(index), parameters)
        study.tell(str(index), value, {})
    study.add("running", settings[-1])
    study.draw(1)
    assert study._memory.visible == [0, 2, 14, 15, 16, 17, 18, 19]  # 1 is dominated and old
    assert SAMPLERS["tpe"].window == 400


def test_limits_reach_the_sampler_as_constraints() -> None:
    study = model("tpe")
    parameters = study.draw(0)
    study.add("a", parameters)
    study.tell("a", (1.0, 2.0), {"latency_ms": 0.5})
    assert trials(study)[0].constraints == {"latency_ms": 0.5}
    assert study._front == {}


def test_a_sampler_repeating_itself_gives_way_to_neighbours() -> None:
    favourite: dict[str, Value] = {
        name: 0.5 if "keep" in name else {"score": "key_norm", "reduce": "drop"}[name.split(".")[1]]
        for name in dimensions(SPACE)
    }
    seen: set[str] = set()
    found = []
    for index in range(5):
        proposal = propose(study(), SHAPE, lambda seed: favourite, 3, [], seen, index)
        assert proposal.schedule is not None
        assert proposal == propose(study(), SHAPE, lambda seed: favourite, 3, [], seen, index)
        seen.add(uid_of(proposal.schedule, SHAPE))
        found.append(proposal)
    assert found[0].schedule == schedule_from(favourite, SPACE, SHAPE) and found[0].rejected == 0
    for proposal in found[1:]:
        assert proposal.schedule is not None and proposal.rejected >= 3
        same = set(proposal.schedule.stages) & set(found[0].schedule.stages)
        assert len(same) >= 3  # at most two blocks differ


def test_a_continuous_space_is_never_counted() -> None:
    space = replace(SPACE, blocks=(2,), keep=Range(0.5, 1.0), reduce=("drop",), score=("key_norm",))
    config = study(space=space)
    seen: set[str] = set()
    sampler = proposer(SAMPLERS["random"], space=space)
    for index in range(32):  # ceil(keep * 64) is 33 to 64 tokens
        proposal = propose(config, SHAPE, sampler.draw, 5, [], seen, index)
        assert proposal.schedule is not None
        seen.add(uid_of(proposal.schedule, SHAPE))
    assert propose(config, SHAPE, sampler.draw, 5, [], seen, 32).schedule is None


def test_auto_begins_with_points_that_fill_the_space() -> None:
    assert quasi_random.count_of(SamplerConfig("auto"), SPACE) == len(dimensions(SPACE)) == 15
    assert quasi_random.count_of(SamplerConfig("auto"), SpaceConfig(blocks=(1, 2))) == 10
    sampler = SamplerConfig("auto", startup=40)
    first = [next(quasi_random.points(sampler, SPACE, index)) for index in range(32)]
    for name, dimension in dimensions(SPACE).items():
        values = Counter(point[name] for point in first)
        expected = 32 / (len(dimension.values) if isinstance(dimension, Choice) else 6)
        assert all(abs(values[value] - expected) <= 2 for value in values), name  # random sampling is off by 5 and more
    again = [str(point) for index in range(8) for point in quasi_random.points(sampler, SPACE, index)]
    assert len(again) == 8 * quasi_random.REDRAWS == len(set(again))
    assert next(quasi_random.points(replace(sampler, seed=1), SPACE, 3)) != first[3]


def test_auto_counts_what_the_study_has_and_then_asks_the_model() -> None:
    config = replace(study(), sampler=SamplerConfig("auto", startup=5))
    asked: list[int] = []

    def draw(seed: int) -> dict[str, Value]:
        asked.append(seed)
        return {}

    for known in range(5):
        found = propose(config, SHAPE, draw, 8, [{}] * known, set(), 9)
        assert found.schedule == schedule_from(next(quasi_random.points(config.sampler, SPACE, known)), SPACE, SHAPE)
    assert not asked
    propose(config, SHAPE, draw, 8, [{}] * 5, set(), 9)
    assert asked == [seed_of(0, 9, 0)]
    assert quasi_random.count_of(SamplerConfig("tpe"), SPACE) == 0


def test_auto_passes_impossible_points_over_and_asks_the_model_at_last() -> None:
    config = replace(study(sampler="auto"), limits=(("gmacs", Limit(at_most=0.0045)),))
    proposal = propose(config, SHAPE, lambda seed: {}, 1, [], set(), 0)
    assert proposal.schedule is not None and proposal.rejected > 0
    impossible = replace(config, limits=(("gmacs", Limit(at_most=0.0)),))
    proposal = propose(impossible, SHAPE, lambda seed: {}, 1, [], set(), 0)
    assert proposal.schedule is None and proposal.rejected > quasi_random.REDRAWS


def test_auto_hands_over_to_nsga2() -> None:
    auto, nsga2 = SAMPLERS["auto"], SAMPLERS["nsga2"]
    assert auto.make == SAMPLERS["token_gp"].make
    assert [in_charge(auto, known, 16) for known in (0, 999, 1000)] == [auto, auto, nsga2]
    assert in_charge(auto, 0, 17) == nsga2
    assert in_charge(SAMPLERS["gp"], 5000, 17) == SAMPLERS["gp"]


@pytest.mark.parametrize("rungs", [1, 3])
def test_auto_finds_the_same_candidates_whatever_interrupts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rungs: int
) -> None:
    """Also after kills, with all three samplers that auto uses."""

    early = replace(SAMPLERS["auto"], handover=Handover("nsga2", candidates=9, workers=16))
    monkeypatch.setitem(SAMPLERS._things, "auto", early)
    monkeypatch.setattr(token_gp, "FEWEST", 4)
    config = replace(small_study(13, "auto"), sampler=SamplerConfig("auto", startup=4))
    if rungs == 1:
        config = replace(config, rungs=config.rungs[:1])
    run(config, tmp_path / "whole")
    for time in (2, 3, 4, 5):  # results of each run, so that kills cover the whole search
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            die_at(patch, "before discarding", time + 1)
            run(config, tmp_path / "killed")
    run(config, tmp_path / "killed")
    whole, killed = ([(one.uid, one.orders) for one in records(tmp_path / name)] for name in ("whole", "killed"))
    assert whole == killed and len(whole) == 13


def test_seeds_are_stable_and_fit_every_generator() -> None:
    assert seed_of(0, "abc", 1) == seed_of(0, "abc", 1) != seed_of(0, "abc", 2)
    assert all(0 <= seed_of(index) < 2**31 for index in range(100))


def test_an_unknown_sampler_is_explained() -> None:
    with pytest.raises(UnknownNameError, match='Did you mean "nsga2"'):
        model("nsga")


def test_optuna_is_left_as_it_was(capfd: pytest.CaptureFixture[str], recwarn: Any) -> None:
    before = (optuna.logging.get_verbosity(), logging.getLogger("optuna").handlers[:])
    for name in OPTUNAS:
        grow(model(name), 12)
    assert (optuna.logging.get_verbosity(), logging.getLogger("optuna").handlers) == before
    assert capfd.readouterr() == ("", "") and not list(recwarn)
