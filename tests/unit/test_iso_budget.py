"""Iso-budget: the projection to a fixed cost, what the sampler learns from it, and which budgets are possible."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from dying import Killed, die_at
from fake_profiles import fake_profile
from fake_search import EVALUATED, SHAPE, SPACE, records, run, study

from prunesearch.config import BlockSpace, IsoBudget, Limit, Objective, SamplerConfig, SpaceConfig
from prunesearch.cost import MACS, estimate_cost, total_cost
from prunesearch.errors import ScheduleError
from prunesearch.evaluate.limits import CostBudget
from prunesearch.samplers.iso_budget import within_budget
from prunesearch.samplers.propose import propose
from prunesearch.samplers.sampler_state import SamplerState
from prunesearch.schedule import Schedule, Stage, resolve
from prunesearch.search.problems import study_problems
from prunesearch.shape import ModelShape
from prunesearch.space.choices import any_value, dimensions, parameters_of, schedule_from, uid_of

DEIT = ModelShape(
    depth=12,
    dim=384,
    heads=6,
    attention_dim=384,
    patch_tokens=196,
    prefix_tokens=1,
    class_tokens=1,
    mlp_macs=1179648,
    stem_macs=57802752,
    head_macs=384000,
)
BUDGET = 0.008


def budget(gmacs: float) -> CostBudget:
    return CostBudget("gmacs", gmacs, MACS, gmacs)


def cost_of(schedule: Schedule, shape: ModelShape) -> float:
    return estimate_cost(shape, schedule).gmacs


def suggestions(count: int, seed: int, shape: ModelShape, space: SpaceConfig = SPACE) -> list[Schedule]:
    """Possible schedules of a space, at random."""
    generator, found = random.Random(seed), []
    while len(found) < count:
        try:
            values = {name: any_value(dimension, generator) for name, dimension in dimensions(space).items()}
            found.append(schedule_from(values, space, shape))
        except ScheduleError:
            pass
    return found


def projected(schedule: Schedule, shape: ModelShape, gmacs: float) -> Schedule | None:
    try:
        return within_budget(schedule, shape, budget(gmacs))
    except ScheduleError:
        return None


@pytest.mark.parametrize("shape", [SHAPE, DEIT], ids=["digits", "deit"])
def test_never_above_the_budget_and_no_stage_could_keep_a_token_more(shape: ModelShape) -> None:
    dense, reached = cost_of(Schedule(), shape), 0
    for index, suggestion in enumerate(suggestions(30, 0, shape)):
        budget = dense * (0.45 + 0.5 * (index % 10) / 10)
        found = projected(suggestion, shape, budget)
        if found is None:
            continue
        reached += 1
        assert cost_of(found, shape) <= budget
        assert 0.95 * budget < cost_of(found, shape)
        for position, step in enumerate(resolve(found, shape)):
            keep = step.stage.keep
            assert keep is not None and 0 < keep < 1 and keep == round(keep, 4)
            if step.kept + 1 < step.before:
                stages = list(found.stages)
                stages[position] = replace(step.stage, keep=None, tokens=step.kept + 1)
                assert cost_of(Schedule(tuple(stages)), shape) > budget
    assert reached >= 20


def test_what_a_stage_does_besides_stays() -> None:
    for suggestion in suggestions(20, 1, SHAPE):
        found = projected(suggestion, SHAPE, BUDGET)
        if found is not None:
            kept = {stage.block: (stage.at, stage.score, stage.reduce) for stage in suggestion.stages}
            for stage in found.stages:
                assert kept[stage.block] == (stage.at, stage.score, stage.reduce)


def test_a_larger_budget_never_costs_less() -> None:
    for suggestion in suggestions(8, 2, SHAPE):
        found = [projected(suggestion, SHAPE, share * cost_of(Schedule(), SHAPE)) for share in (0.6, 0.7, 0.8, 0.9)]
        costs = [cost_of(schedule, SHAPE) for schedule in found if schedule is not None]
        assert costs == sorted(costs)


def test_removes_more_where_more_was_removed() -> None:
    found = within_budget(Schedule((Stage(2, keep=0.9), Stage(4, keep=0.5), Stage(6, keep=0.7))), DEIT, budget(3.0))
    mild, strong, middle = (stage.keep or 0.0 for stage in found.stages)
    assert strong < middle < mild
    again = within_budget(found, DEIT, budget(3.0))
    assert [step.kept for step in resolve(again, DEIT)] == [step.kept for step in resolve(found, DEIT)]


@pytest.mark.parametrize(
    ("stages", "gmacs"),
    [
        ((), 0.01),  # no stage
        ((Stage(6, keep=0.5),), 0.004),  # the stage comes too late
        ((Stage(2, reduce="merge", keep=0.8),), 0.006),  # merge can at most halve
        ((Stage(1, reduce="pool", tokens=4), Stage(4, keep=0.9)), 0.012),  # already below the budget
    ],
)
def test_what_cannot_come_to_the_budget_is_refused(stages: tuple[Stage, ...], gmacs: float) -> None:
    with pytest.raises(ScheduleError, match=r"budget.gmacs.*cannot come to this"):
        within_budget(Schedule(stages), SHAPE, budget(gmacs))


def test_proposals_carry_what_was_drawn() -> None:
    config = study(budget=IsoBudget(BUDGET))
    drawn = parameters_of(Schedule((Stage(1, keep=0.8), Stage(3, keep=0.5))), SPACE)
    assert drawn is not None
    proposal = propose(config, SHAPE, lambda seed: drawn, 1, [], set(), 0)
    assert proposal.schedule is not None and proposal.parameters == drawn
    assert parameters_of(proposal.schedule, SPACE) is None  # off the grid, so it has no parameters
    seen = {uid_of(proposal.schedule, SHAPE)}
    second = propose(config, SHAPE, lambda seed: drawn, 1, [], seen, 0)
    assert second.schedule is not None and uid_of(second.schedule, SHAPE) not in seen


def test_a_search_competes_at_one_cost(tmp_path: Path) -> None:
    EVALUATED.clear()
    space = replace(SPACE, start_from=("evit-0.7",))
    done, _ = run(study(16, "tpe", space=space, budget=IsoBudget(BUDGET)), tmp_path)
    assert done.complete == 16 == len(set(EVALUATED))
    dense, start, *searched = records(tmp_path)
    assert dense.schedule == Schedule() and start.origin == "start: evit-0.7"  # not projected
    for record in searched:
        assert 0.95 * BUDGET < cost_of(record.schedule, SHAPE) <= BUDGET
        assert record.parameters is not None
        suggestion = schedule_from(record.parameters, space, SHAPE)
        assert within_budget(suggestion, SHAPE, budget(BUDGET)) == record.schedule


@pytest.mark.parametrize("step", ["result", "written", "claimed", "discarded"])
def test_a_kill_loses_nothing_of_what_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    config = replace(study(9, "tpe", budget=IsoBudget(BUDGET)), sampler=SamplerConfig("tpe", startup=3))
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, step, 5)
        run(config, tmp_path / "killed")
    run(config, tmp_path / "killed")
    whole, killed = ([(one.uid, one.parameters) for one in records(tmp_path / name)] for name in ("whole", "killed"))
    assert whole == killed


def test_the_sampler_learns_what_it_drew_and_nothing_of_other_costs(tmp_path: Path) -> None:
    space = replace(SPACE, start_from=("evit-0.7",))
    config = study(8, budget=IsoBudget(BUDGET), space=space)
    run(config, tmp_path)
    found = records(tmp_path)
    state = SamplerState(config)
    state.take_up(found)
    assert state.known == [record.parameters for record in found[2:]]
    unbound = SamplerState(replace(config, budget=None))
    unbound.take_up(found)
    assert unbound.known[0] == parameters_of(Schedule(), space)


def test_a_budget_that_cannot_be_met_is_explained() -> None:
    def problems(gmacs: float, **changes: object) -> list[str]:
        return study_problems(study(budget=IsoBudget(gmacs), **changes))

    assert problems(BUDGET) == []
    assert "budget.gmacs: 0.02; possible: from 0.00" in problems(0.02)[0]
    assert "below the dense model's 0.01283" in problems(0.001)[0]
    late = SpaceConfig(blocks=(6,), keep=(0.5, 1.0))
    assert "possible: from 0.01" in problems(0.009, space=late)[0]
    assert problems(0.009, space=replace(late, blocks=(3, 6))) == []
    assert problems(0.009, space=replace(late, blocks=(3, 6), max_stages=1)) == []
    assert problems(0.008, space=replace(late, blocks=(4, 6), reduce=("merge",)))  # two halvings are too few
    threshold = SpaceConfig(blocks=(2, BlockSpace(4, amount=("threshold",), threshold=(0.01,))), score=("key_norm",))
    assert "has thresholds" in problems(BUDGET, space=threshold)[0]
    top1 = (Objective("top1", "maximize"),)
    assert "Write limits: {gmacs: {at_most: 0.008}}" in problems(BUDGET, objectives=top1)[0]
    assert problems(BUDGET, objectives=top1, limits=(("gmacs", Limit(at_most=BUDGET)),)) == []
    assert "every candidate costs the budget" in problems(BUDGET, limits=(("gmacs", Limit(at_most=0.007)),))[0]


def test_a_budget_in_milliseconds_is_kept() -> None:
    """Later stages keep as many tokens as the budget allows, also where the MLP's time is a staircase."""
    profile = fake_profile(DEIT)
    dense, found = total_cost(DEIT, Schedule(), profile), 0
    for suggestion in suggestions(60, 3, DEIT, SpaceConfig(blocks=(2, 4, 6, 8), keep=(0.4, 0.6, 0.8, 1.0))):
        amount = 0.75 * dense
        try:
            moved = within_budget(suggestion, DEIT, CostBudget("predicted_latency_ms", amount, profile, "75%"))
        except ScheduleError as error:
            assert error.place == "budget.predicted_latency_ms"
            continue
        found += 1
        assert 0.8 * amount < total_cost(DEIT, moved, profile) <= amount  # a stair may be in between
    assert found > 20
