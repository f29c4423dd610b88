"""Sensitivities and the front that they predict, compared with plain forward passes and brute force."""

from __future__ import annotations

import itertools
import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_profiles import fake_profile
from fake_search import RUNGS, SHAPE, SPACE, records, run, study

from prunesearch.cli import main
from prunesearch.config import (
    BlockSpace,
    DataConfig,
    IsoBudget,
    Limit,
    ModelConfig,
    Range,
    SpaceConfig,
    StopConfig,
    StudyConfig,
    ThresholdRange,
)
from prunesearch.cost import MACS, CostTable, estimate_cost, total_cost
from prunesearch.errors import FileError, ScheduleError, StudyError
from prunesearch.evaluate import build_model, measure_sensitivity, model_shape
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.measure_sensitivity import measure_sensitivities
from prunesearch.evaluate.sensitivity import Effect, Sensitivities, load_sensitivities, save_sensitivities, stages_of
from prunesearch.front import hypervolume
from prunesearch.models import apply_schedule
from prunesearch.record import SENSITIVITY
from prunesearch.schedule import Schedule, resolve
from prunesearch.search import sensitivity_front
from prunesearch.search.problems import start_schedules, study_problems
from prunesearch.search.sensitivity_front import predicted_front
from prunesearch.search.sensitivity_start import FILE, MOST_STARTS, kept_sensitivities, predicted_starts
from prunesearch.shape import ModelShape
from prunesearch.space.choices import combination, combinations, parameters_of, schedule_from

DIGITS = ModelConfig("vit_digits_patch1_8", pretrained=True)
SMALL = replace(SHAPE, depth=4, patch_tokens=20)


def digits(space: SpaceConfig, images: int = 12) -> StudyConfig:
    return study(model=DIGITS, data=DataConfig("digits", train_images=images, val_images=4), space=space)


def made_up(space: SpaceConfig, shape: ModelShape, seed: int = 0) -> list[Effect]:
    generator = random.Random(seed)
    stages, _ = stages_of(space, shape)
    return [Effect(stage, (1 - (stage.keep or 0)) ** 2 * generator.uniform(0.5, 2), 50.0) for stage in stages]


def table(config: StudyConfig, seed: int = 0) -> Sensitivities:
    effects = tuple(made_up(config.space, model_shape(config.model), seed))
    return Sensitivities(1, config.model, config.data, 256, 0.9, effects, 1.0, "cpu")


# --- measuring ---------------------------------------------------------------------------------------------------


def test_it_is_what_whole_forward_passes_give() -> None:
    space = SpaceConfig(
        blocks=(0, BlockSpace(7, reduce=("drop", "fuse", "merge"))),
        keep=(0.5, 1.0),
        at=("mid", "pre"),
        score=("class_attention", "key_norm", "random"),
        reduce=("drop", "merge"),
    )
    config = digits(space)
    found = measure_sensitivities(config, 5)
    assert found.images == 5
    model = build_model(DIGITS)
    train, _ = open_data(replace(config.data, train_images=5), model)
    images, _ = next(train.batches([torch.arange(5)], torch.device("cpu")))
    with torch.no_grad():
        dense = model(images).double().log_softmax(1)
        for effect in found.effects:
            torch.manual_seed(0)
            pruned = apply_schedule(model, Schedule((effect.stage,)))(images).double().log_softmax(1)
            divergence = torch.nn.functional.kl_div(pruned, dense, reduction="batchmean", log_target=True).item()
            same = (pruned.argmax(1) == dense.argmax(1)).double().mean().item()
            assert effect.divergence == pytest.approx(divergence, rel=1e-5, abs=1e-12), effect.stage
            assert effect.agreement == pytest.approx(100 * same, rel=1e-5)
    assert found.confidence == pytest.approx(dense.exp().amax(1).mean().item(), rel=1e-5)
    places = {(effect.stage.block, effect.stage.at) for effect in found.effects if effect.stage.reduce == "merge"}
    assert places == {(0, "mid"), (7, "mid"), (7, "pre")}  # block 0 has no attention before it


def test_what_removes_nothing_changes_nothing_at_all() -> None:
    found = measure_sensitivities(digits(SpaceConfig(blocks=(1, 4), keep=(0.999, 1.0), at=("pre", "mid"))))
    assert [(effect.divergence, effect.agreement) for effect in found.effects] == [(0.0, 100.0)] * 4


def test_it_is_repeatable_and_leaves_random_numbers_alone() -> None:
    config = digits(SpaceConfig(blocks=(5,), keep=(0.5, 0.8), score=("random",)))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = measure_sensitivities(config)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert measure_sensitivities(config).effects == first.effects
    alone = measure_sensitivities(replace(config, space=replace(config.space, keep=(0.8,))))
    assert alone.effects == first.effects[1:]


def test_validation_images_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunesearch.evaluate import data

    opened: list[str] = []
    real = data.DATASETS["digits"]
    spy = lambda config, split: (opened.append(split), real(config, split))[1]  # noqa: E731
    monkeypatch.setitem(data.DATASETS._things, "digits", spy)
    data._open_split.cache_clear()
    data._open.cache_clear()
    measure_sensitivities(digits(SpaceConfig(blocks=(7,), keep=(0.5,))))
    assert opened == ["train"]


def test_what_learns_is_left_out_by_name() -> None:
    space = SpaceConfig(
        blocks=(1, BlockSpace(2, keep=Range(0.5, 0.9, 0.2)), BlockSpace(3, keep=Range(0.3, 1.0))),
        keep=(0.6, 1.0),
        score=("class_attention", "predictor"),
        reduce=("drop", "pool"),
        amount=("keep", "threshold"),
        threshold=ThresholdRange(0.001, 0.01),
    )
    stages, left_out = stages_of(space, SHAPE)
    assert left_out == ("pool", "predictor", "thresholds")
    assert {(stage.score, stage.reduce) for stage in stages} == {("class_attention", "drop")}
    keeps = {block: [stage.keep for stage in stages if stage.block == block] for block in (1, 2, 3)}
    assert keeps == {1: [0.6], 2: [0.5, 0.7, 0.9], 3: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}


def test_nothing_to_measure_is_a_mistake_of_the_study() -> None:
    space = SpaceConfig(blocks=(1,), score=("predictor",), start_from=("sensitivity",))
    problems = study_problems(study(space=space))
    assert len(problems) == 1 and problems[0].startswith("space.start_from[0]: sensitivity: predictor mean nothing")
    with pytest.raises(StudyError, match="Possible: keep ratios below 1"):
        measure_sensitivities(study(space=space))


# --- the file ----------------------------------------------------------------------------------------------------


def test_the_table_survives_its_file(tmp_path: Path) -> None:
    found = table(study(data=DataConfig("digits", train_images=9)))
    save_sensitivities(found, tmp_path / "a.json")
    assert load_sensitivities(tmp_path / "a.json") == found
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(FileError, match="cannot be read as JSON"):
        load_sensitivities(tmp_path / "a.json")


def test_a_table_fits_its_model_data_and_space() -> None:
    config = study()
    found = table(config)
    assert found.fits(config)
    assert found.fits(replace(config, data=DataConfig("digits", val_split="first half", val_images=3)))
    assert found.fits(replace(config, space=replace(SPACE, keep=(0.5, 0.8), same=("score",), max_stages=2)))
    assert not found.fits(replace(config, space=replace(SPACE, keep=(0.55, 1.0))))
    assert not found.fits(replace(config, model=DIGITS))
    assert not found.fits(replace(config, data=DataConfig("digits", train_split="validation")))


# --- the predicted front -----------------------------------------------------------------------------------------


def brute_force(
    effects: list[Effect], space: SpaceConfig, shape: ModelShape, costs: CostTable = MACS
) -> list[tuple[float, float]]:
    """(cost, damage) of the front of all schedules whose stages were measured."""
    known = {effect.stage: effect.divergence for effect in effects}
    points = set()
    for index in range(combinations(space) or 0):
        try:
            schedule = schedule_from(combination(space, index), space, shape)
            pairs = zip(schedule.stages, resolve(schedule, shape), strict=True)
            steps = [(stage, step) for stage, step in pairs if not step.is_idle]
            damage = sum(known[stage] for stage, step in steps)
        except (ScheduleError, KeyError):
            continue
        points.add((total_cost(shape, schedule, costs), damage))
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1] - 1e-12:
            best.append(point)
    return best


SPACES = {
    "free": SpaceConfig(blocks=(0, 2, 3), keep=(0.4, 0.7, 1.0), score=("class_attention", "key_norm")),
    "verbs": SpaceConfig(blocks=(2, 0, 3), keep=(0.45, 0.8, 1.0), reduce=("fuse", "merge")),
    "places": SpaceConfig(blocks=(1, 2, 3), keep=(0.3, 0.6, 1.0), at=("mid", "pre")),
    "no skip": SpaceConfig(blocks=(0, 1, 3), keep=(0.5, 0.6, 0.9), reduce=("drop", "merge")),
    "own": SpaceConfig(blocks=(BlockSpace(1, keep=(0.5,)), 2, 3), keep=(0.4, 0.7, 1.0)),
    "same score": SpaceConfig(
        blocks=(1, 3), keep=(0.5, 0.6, 1.0), score=("class_attention", "key_norm"), reduce=("drop", "merge"),
        same=("score",),
    ),
    "same verb": SpaceConfig(blocks=(1, 2, 3), keep=(0.6, 1.0), reduce=("drop", "merge", "fuse"), same=("reduce",)),
    "same keep": SpaceConfig(blocks=(1, 2, 3), keep=(0.4, 0.6, 0.8), reduce=("drop", "squeeze"), same=("keep",)),
    "back": SpaceConfig(blocks=(0, 2, 3), keep=(0.4, 0.7, 1.0), until=("never", "next", "end")),
    "back before a stage at pre": SpaceConfig(
        blocks=(1, 2, 3), keep=(0.4, 1.0), at=("mid", "pre"), reduce=("merge", "drop"), until=("next", "end"),
    ),
    "hold": SpaceConfig(blocks=(1, 2, 3), keep=(0.4, 0.7, 1.0), reduce=("drop", "hold")),
    "same until": SpaceConfig(
        blocks=(1, 2, 3), keep=(0.4, 0.7, 1.0), reduce=("squeeze", "hold"), until=("never", "next", "end"),
        same=("until",),
    ),
    "same keep or none": SpaceConfig(blocks=(1, 2, 3), keep=(0.4, 0.6), amount=("keep", "none"), same=("keep",)),
}  # fmt: skip


@pytest.mark.parametrize("max_stages", [None, 1, 2])
@pytest.mark.parametrize("name", SPACES)
def test_the_front_is_that_of_all_schedules(name: str, max_stages: int | None) -> None:
    space = replace(SPACES[name], max_stages=max_stages)
    effects = made_up(space, SMALL)
    found = predicted_front(effects, space, SMALL)
    expected = brute_force(effects, space, SMALL)
    assert [(point.cost, point.divergence) for point in found] == [pytest.approx(point) for point in expected]
    for point in found:
        assert parameters_of(point.schedule, space) is not None
        assert estimate_cost(SMALL, point.schedule).gmacs == pytest.approx(point.cost, abs=1e-12)


@pytest.mark.parametrize("name", SPACES)
def test_the_front_in_milliseconds_is_that_of_all_schedules(name: str) -> None:
    """Blocks after merging cost more by this profile, and the MLP is a staircase."""
    space, profile = SPACES[name], fake_profile(SMALL)
    effects = made_up(space, SMALL)
    found = predicted_front(effects, space, SMALL, profile)
    expected = brute_force(effects, space, SMALL, profile)
    assert [(point.cost, point.divergence) for point in found] == [pytest.approx(point) for point in expected]


def test_a_stage_that_can_only_stand_behind_others_is_none_of_them() -> None:
    """merge cannot reduce 20 tokens to 8, so its damage alone is unknown."""
    space = SpaceConfig(blocks=(1,), keep=(0.4, 1.0), reduce=("merge",))
    assert predicted_front(made_up(space, SMALL), space, SMALL)[0].schedule == Schedule()


def test_long_fronts_are_thinned_with_little_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    space = replace(SPACE, score=("class_attention",), blocks=(1, 2, 3, 4), reduce=("drop", "merge"))
    effects = made_up(space, SHAPE)
    exact = predicted_front(effects, space, SHAPE)
    monkeypatch.setattr(sensitivity_front, "MOST_POINTS", 20)
    thinned = predicted_front(effects, space, SHAPE)
    assert (thinned[0].cost, thinned[-1].schedule) == (pytest.approx(exact[0].cost), Schedule())
    assert all(estimate_cost(SHAPE, point.schedule).gmacs == pytest.approx(point.cost) for point in thinned)
    for point in thinned:  # the exact front's damage at no higher cost
        best = min(other.divergence for other in exact if other.cost <= point.cost + 1e-12)
        assert best - 1e-12 <= point.divergence <= 1.1 * best + 1e-12


def test_starts_are_within_limits_and_spread_over_them() -> None:
    config = study(limits=(("gmacs", Limit(at_least=0.006, at_most=0.0115)),))
    starts = predicted_starts(config, SHAPE, table(config))
    costs = sorted(point.cost for point in starts)
    assert len(starts) == MOST_STARTS
    assert costs[0] >= 0.006 and costs[-1] <= 0.0115
    widest = max(after - before for before, after in itertools.pairwise(costs))
    assert widest < 2 * (costs[-1] - costs[0]) / (MOST_STARTS - 1)
    assert all(parameters_of(point.schedule, config.space) is not None for point in starts)
    free = predicted_starts(replace(config, limits=()), SHAPE, table(config))
    assert all(point.schedule.stages for point in free)  # the dense model is evaluated anyway


def test_the_first_starts_matter_most() -> None:
    config = study()
    starts = predicted_starts(config, SHAPE, table(config))
    losses = np.array([(point.divergence, point.cost) for point in starts])
    scaled = (losses - losses.min(axis=0)) / np.ptp(losses, axis=0)
    volumes = [hypervolume(scaled[:count], np.full(2, 1.1)) for count in range(len(starts) + 1)]
    gains = np.diff(volumes)
    assert (np.diff(gains) <= 1e-12).all() and volumes[4] > 0.8 * volumes[-1]


def test_starts_of_a_budget_are_next_to_it() -> None:
    config = study(budget=IsoBudget(0.008))
    starts = predicted_starts(config, SHAPE, table(config))
    assert len(starts) == MOST_STARTS and all(0.9 * 0.008 < point.cost <= 0.008 for point in starts)


# --- as start schedules ------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[StudyConfig]:
    """Names of the studies whose (fake) measurement ran."""
    calls: list[StudyConfig] = []

    def measure(config: StudyConfig, count: int) -> Sensitivities:
        calls.append(config)
        return table(config)

    monkeypatch.setattr(measure_sensitivity, "measure_sensitivities", measure)
    return calls


def test_anchors_measure_once_and_in_a_folder_only(measured: list[StudyConfig], tmp_path: Path) -> None:
    config = study(space=replace(SPACE, start_from=("sensitivity", "etps-0.7")))
    assert study_problems(config) == []
    assert [origin for origin, _ in start_schedules(config, SHAPE)] == ["dense", "start: etps-0.7"]
    assert not measured
    first = start_schedules(config, SHAPE, tmp_path)
    assert [origin for origin, _ in first] == ["dense", *[SENSITIVITY] * MOST_STARTS, "start: etps-0.7"]
    assert [schedule for _, schedule in first[1:-1]] == [
        point.schedule for point in predicted_starts(config, SHAPE, table(config))
    ]
    assert start_schedules(config, SHAPE, tmp_path) == first and len(measured) == 1


def test_a_study_begins_with_them_and_they_always_go_on(measured: list[StudyConfig], tmp_path: Path) -> None:
    config = study(trials=20, rungs=RUNGS, space=replace(SPACE, start_from=("evit-0.7", "sensitivity")))
    run(config, tmp_path)
    found = sorted(records(tmp_path), key=lambda record: record.number)
    origins = [record.origin for record in found]
    assert origins == ["dense", "start: evit-0.7", *[SENSITIVITY] * MOST_STARTS, "sampler", "sampler"]
    assert {record.rung_done for record in found[:-2]} == {2}
    run(replace(config, stop=StopConfig(trials=21)), tmp_path)
    assert len(records(tmp_path)) == 21 and len(measured) == 1


@pytest.mark.parametrize("why", ["space", "file"])
def test_what_does_not_fit_is_measured_again(
    why: str, measured: list[StudyConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = study()
    kept_sensitivities(config, tmp_path / FILE)
    if why == "space":
        config = replace(config, space=replace(SPACE, keep=(0.55, 1.0)))
    else:
        (tmp_path / FILE).write_text('{"version": 1}')
    with caplog.at_level(logging.WARNING):
        found = kept_sensitivities(config, tmp_path / FILE)
    assert len(measured) == 2 and "measured again" in caplog.text
    assert load_sensitivities(tmp_path / FILE) == found and found.fits(config)


# --- the command line --------------------------------------------------------------------------------------------

STUDY = """
version: 1
name: small
model: {name: vit_digits_patch1_8, pretrained: true}
data: {name: digits, train_images: 60, val_images: 60}
space: {blocks: [5, 7], keep: [0.5, 0.7, 1.0], score: [class_attention, key_norm], reduce: [drop, merge, pool],
        start_from: [sensitivity]}
"""


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(STUDY)
    files = ["-o", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    assert main(["sensitivity", str(file), "--images", "6", *files]) == 0
    shown = capsys.readouterr().out
    assert "KL(dense || pruned)" in shown and "left out, as they say nothing without training: pool" in shown
    assert "start_from: [sensitivity]" in shown and "7 drop 0.5" in shown
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    found = load_sensitivities(tmp_path / "s.json")
    assert found.images == 6 and len(found.effects) == 12

    assert main(["sensitivity", str(file), "--images", "6", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["effects"]) == 12 and content["predicted"]

    assert main(["check", str(file)]) == 0
    assert "up to 16 schedules, predicted from 12 stages" in capsys.readouterr().out
    assert main(["sensitivity", str(file), "--images", "0"]) == 2
    assert "possible: a whole number from 1" in capsys.readouterr().err
