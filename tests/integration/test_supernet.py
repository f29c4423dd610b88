"""Shared weights: the loss of a step, continuing a training, and candidates that start from them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunesearch.config import (
    Budget,
    DataConfig,
    FinetuneConfig,
    Limit,
    ModelConfig,
    SamplerConfig,
    SpaceConfig,
    StopConfig,
    StudyConfig,
    SupernetConfig,
    Target,
    ThresholdRange,
    WorkersConfig,
)
from prunesearch.cost import estimate_cost
from prunesearch.errors import RunError, ScheduleError, StudyError
from prunesearch.evaluate import Evaluation, Task, build_model, evaluate, model_shape, sampling
from prunesearch.evaluate import supernet as module
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.finetune import Batch, Progress, distillation_loss, take_steps
from prunesearch.evaluate.limits import AbsoluteLimit
from prunesearch.evaluate.outcome import same_work
from prunesearch.evaluate.supernet import is_trained, made_with, schedules_of_step
from prunesearch.evaluate.task import SupernetWork
from prunesearch.export.schedules import export
from prunesearch.files import from_mapping, load_schedule_file, to_mapping
from prunesearch.record import Record
from prunesearch.report.live import LiveReport
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.driver import run_study
from prunesearch.search.events import Event
from prunesearch.search.problems import study_problems
from prunesearch.search.shared_weights import SupernetTrained, prepare_supernet, shared_weights, supernet_task
from prunesearch.search.tasks import candidate_task
from prunesearch.space.choices import combination, combinations, schedule_from
from prunesearch.study.reader import open_study_readonly
from prunesearch.workers.protocol import Lost, NoWorkers, Outcome
from prunesearch.workers.serial import SerialWorkers

SMALL = ModelConfig("vit_digits_patch1_8", options=(("depth", 3),))
SHAPE = model_shape(SMALL)
SPACE = SpaceConfig(blocks=(0, 1), keep=(0.3, 0.5, 0.7, 1.0), reduce=("drop", "merge"))
STUDY = StudyConfig(
    version=1,
    name="shared",
    model=SMALL,
    space=SPACE,
    data=DataConfig(train_images=96, val_images=40),
    finetune=FinetuneConfig(learning_rate=1e-3, batch_size=16, augment="flip"),
    evaluation="supernet",
    supernet=SupernetConfig(images=100, schedules=1),
    rungs=(Budget(images=0), Budget(images=32)),
    workers=WorkersConfig(kind="serial"),
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def draw_schedule(work: SupernetWork, model: ModelConfig, generator: random.Random) -> Schedule:
    return sampling.draw_schedule(work.space, work.limits, Target(model), generator)


def cheapest_schedule(work: SupernetWork, model: ModelConfig) -> Schedule:
    return sampling.cheapest_schedule(work.space, work.limits, Target(model))


def work(space: SpaceConfig = SPACE, schedules: int = 2, **limits: AbsoluteLimit) -> SupernetWork:
    return SupernetWork(space, schedules, 100, tuple(limits.items()))


def gmacs(schedule: Schedule) -> float:
    return estimate_cost(SHAPE, schedule).gmacs


def candidates(space: SpaceConfig) -> Iterator[Schedule]:
    for index in range(combinations(space) or 0):
        with suppress(ScheduleError):
            yield schedule_from(combination(space, index), space, SHAPE)


# --- which schedules -----------------------------------------------------------------------------------------------


def test_a_step_is_dense_cheapest_and_random_ones_by_seed_and_position() -> None:
    task = supernet_task(STUDY, Path("/nowhere"))
    step = schedules_of_step(task, work(schedules=3), 16)
    assert step[:2] == [Schedule(), cheapest_schedule(work(schedules=3), SMALL)]
    assert len(step) == 5
    assert step == schedules_of_step(task, work(schedules=3), 16)
    others = [schedules_of_step(task, work(schedules=3), images)[2:] for images in range(0, 320, 16)]
    assert len({str(drawn) for drawn in others}) > 15
    assert schedules_of_step(replace(task, seed=1), work(schedules=3), 16)[2:] != step[2:]


def test_draws_keep_to_limits_and_reach_the_whole_space() -> None:
    generator = random.Random(0)
    everything = {str(draw_schedule(work(), SMALL, generator)) for _ in range(400)}
    assert everything == set(map(str, candidates(SPACE)))
    limited = work(gmacs=AbsoluteLimit(at_most=gmacs(Schedule()) * 0.8), top1=AbsoluteLimit(at_least=50.0))
    costs = [gmacs(draw_schedule(limited, SMALL, generator)) for _ in range(50)]
    assert max(costs) <= gmacs(Schedule()) * 0.8


def test_draws_have_at_most_max_stages_but_not_always_as_many() -> None:
    space = SpaceConfig(blocks=(0, 1, 2), keep=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0), max_stages=2)
    drawn = [draw_schedule(work(space), SMALL, random.Random(seed)) for seed in range(60)]
    assert {len(schedule.stages) for schedule in drawn} >= {1, 2}
    assert max(len(schedule.stages) for schedule in drawn) == 2
    assert {stage.block for schedule in drawn for stage in schedule.stages} == {0, 1, 2}


@pytest.mark.parametrize("max_stages", [None, 1, 2])
@pytest.mark.parametrize("least", [0.0, 0.6])
def test_the_cheapest_is_the_cheapest_of_all(max_stages: int | None, least: float) -> None:
    keeps, verbs = (0.3, 0.5, 0.9, 1.0), ("drop", "merge")
    space = SpaceConfig(blocks=(0, 1, 2), keep=keeps, reduce=verbs, at=("mid", "pre"), max_stages=max_stages)
    bound = least * gmacs(Schedule())
    found = gmacs(cheapest_schedule(work(space, gmacs=AbsoluteLimit(at_least=bound)), SMALL))
    best = min(cost for schedule in candidates(space) if (cost := gmacs(schedule)) >= bound)
    assert found == pytest.approx(best, rel=0.01 if least else 1e-9)  # with at_least it may miss the optimum


def test_a_space_without_candidates_is_said() -> None:
    with pytest.raises(StudyError, match="none of 10000 random schedules is within the limits"):
        draw_schedule(work(gmacs=AbsoluteLimit(at_most=1e-6)), SMALL, random.Random(0))


# --- training ------------------------------------------------------------------------------------------------------


def test_gradients_of_all_losses_make_one_step() -> None:
    def moments(weights: tuple[float, ...]) -> list[Tensor]:
        model = build_model(SMALL)
        train = open_data(STUDY.data, model)[0]

        def losses(batch: Batch) -> Iterator[Tensor]:
            for weight in weights:
                yield weight * distillation_loss(model(batch.images), batch.labels, None, STUDY.finetune)

        progress = Progress()
        settings = replace(STUDY.finetune, clip_grad=None)
        take_steps(model, train, Budget(images=16), settings, None, CPU, 0, progress, losses, lambda: 0.0)
        assert {int(moments["step"]) for moments in progress.moments.values()} == {1}
        return [moments["exp_avg"] for moments in progress.moments.values()]

    for one, several in zip(moments((1.0,)), moments((0.5, 0.25, 0.25)), strict=True):
        assert torch.allclose(one, several, atol=1e-7)
        assert one.abs().max() > 1e-6


class Trained:
    """Results of prepare_supernet in a folder, with the worker in this process."""

    def __init__(self, folder: Path, config: StudyConfig = STUDY, die_after: int | None = None) -> None:
        self.images: list[int] = []

        def told(event: SupernetTrained) -> None:
            self.images.append(event.images)
            if event.images == die_after:
                raise SystemError("killed")

        workers = SerialWorkers(config.workers, folder / "outbox")
        self.path = prepare_supernet(config, folder, folder / "outbox", workers, told)


def test_it_trains_in_parts_and_lands_complete(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    assert trained.images == [16, 32, 48, 64, 80, 96, 100]
    assert (
        trained.path == shared_weights(STUDY.evaluation, tmp_path) == str(tmp_path / "weights" / "supernet.safetensors")
    )
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["supernet.safetensors"]
    assert not list((tmp_path / "outbox").iterdir())
    assert prepare_supernet(STUDY, tmp_path, tmp_path / "outbox", NoWorkers()) == trained.path
    assert prepare_supernet(replace(STUDY, evaluation="finetune"), tmp_path, tmp_path, NoWorkers()) is None


def test_a_kill_changes_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    whole = load_file(str(Trained(tmp_path / "whole").path))
    with pytest.raises(SystemError):
        Trained(tmp_path / "killed", die_after=48)
    assert [path.name for path in (tmp_path / "killed" / "weights").iterdir()] == ["supernet.state"]
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        draw = module.schedules_of_step
        patch.setattr(module, "schedules_of_step", lambda *a: steps.append(a[2]) or draw(*a))
        again = Trained(tmp_path / "killed")
    assert steps == [48, 64, 80, 96]
    parts = load_file(str(again.path))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert not torch.equal(whole["head.weight"], build_model(SMALL).head.weight)


def test_other_settings_make_them_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemError):
        Trained(tmp_path, die_after=48)
    other = replace(STUDY, finetune=replace(STUDY.finetune, learning_rate=5e-4))
    assert Trained(tmp_path, other).images[0] == 16
    assert "supernet.state was made with other settings" in caplog.text
    before = load_file(tmp_path / "weights" / "supernet.safetensors")
    assert Trained(tmp_path).images[-1] == 100
    assert "supernet.safetensors was made with other settings" in caplog.text
    assert not torch.equal(
        before["head.weight"], load_file(tmp_path / "weights" / "supernet.safetensors")["head.weight"]
    )


def test_what_decides_the_weights_is_what_they_were_made_with(tmp_path: Path) -> None:
    task = supernet_task(STUDY, tmp_path)
    data = replace(STUDY.data, root="/there", test_root="/also", loaders=7)
    elsewhere = replace(STUDY, data=data, workers=WorkersConfig())
    start = replace(STUDY, space=replace(SPACE, start_from=("evit-0.7",)))
    for same in (elsewhere, start):
        assert made_with(supernet_task(same, tmp_path / "moved")) == made_with(task)
    for other in (
        replace(STUDY, space=replace(SPACE, keep=(0.5, 1.0))),
        replace(STUDY, limits=(("gmacs", Limit(at_most=1.0)),)),
        replace(STUDY, supernet=SupernetConfig(images=100, schedules=2)),
        replace(STUDY, sampler=replace(STUDY.sampler, seed=1)),
        replace(STUDY, model=replace(SMALL, pretrained=True)),
    ):
        assert made_with(supernet_task(other, tmp_path)) != made_with(task)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "supernet.safetensors").write_bytes(b"not one of ours")
    assert not is_trained(task)


@pytest.mark.slow
def test_all_schedules_get_better(tmp_path: Path) -> None:
    model = ModelConfig("vit_digits_patch1_8", pretrained=True)
    space = SpaceConfig(blocks=(0, 2, 4), keep=(0.3, 0.5, 0.7, 1.0))
    config = replace(STUDY, model=model, space=space, data=DataConfig(train_images=200, val_images=200))
    config = replace(config, supernet=SupernetConfig(images=200), finetune=replace(STUDY.finetune, learning_rate=5e-4))
    path = Trained(tmp_path, config).path
    cheap = cheapest_schedule(work(space), model)
    for schedule in (cheap, Schedule((Stage(0, keep=0.5), Stage(4, keep=0.7)))):
        task = replace(candidate(config, schedule), metrics=("loss",))
        assert evaluate(replace(task, start=path)).value("loss") < 0.8 * evaluate(task).value("loss")


# --- through workers -----------------------------------------------------------------------------------------------


class FakeWorkers:
    """A worker that returns given outcomes, or evaluates. Some waits return nothing."""

    count, description = 1, "fake"

    def __init__(self, *answers: object) -> None:
        self.answers, self.tasks = list(answers), []

    def submit(self, task: Task) -> None:
        self.tasks.append(task)

    def wait(self, seconds: float) -> list[Outcome]:
        answer = self.answers.pop(0) if self.answers else "evaluate"
        if answer is None:
            return []
        return [(self.tasks[-1], evaluate(self.tasks[-1]) if answer == "evaluate" else answer)]

    def close(self) -> None:
        return None


def test_a_dead_worker_costs_one_part(tmp_path: Path) -> None:
    died = Lost("crash", "its node went away")
    workers = FakeWorkers("evaluate", None, died, None, "evaluate", "evaluate", died)
    path = prepare_supernet(STUDY, tmp_path, tmp_path, workers)
    assert path is not None and Path(path).is_file()
    tried = [(task.budget.images, task.attempt) for task in workers.tasks]
    assert tried == [(16, 0), (32, 0), (32, 1), (48, 0), (64, 0), (64, 1), (80, 0), (96, 0), (100, 0)]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([Lost("crash", "gone"), Lost("crash", "gone again")], r"could not be trained \(crash\): gone again"),
        ([Lost("timeout", "no result after 5 s")], r"\(timeout\): no result after 5 s"),
        ([Evaluation("supernet", "failed", cause="nan", error="the loss became nan")], r"\(nan\): the loss became nan"),
        ([Evaluation("supernet", "complete", images=100)], "disk that this machine and all workers share"),
    ],
)
def test_what_goes_wrong_ends_the_run_and_is_said(tmp_path: Path, answers: list[object], said: str) -> None:
    with pytest.raises(RunError, match=said):
        prepare_supernet(STUDY, tmp_path, tmp_path, FakeWorkers(*answers))


def test_being_stopped_keeps_what_is_trained(tmp_path: Path) -> None:
    asked = itertools.count()
    with pytest.raises(KeyboardInterrupt):
        prepare_supernet(STUDY, tmp_path, tmp_path, FakeWorkers(), is_stopped=lambda: next(asked) >= 2)
    workers = FakeWorkers()
    prepare_supernet(STUDY, tmp_path, tmp_path, workers)
    assert [task.budget.images for task in workers.tasks] == [16, 48, 64, 80, 96, 100]


def test_a_learning_rate_that_explodes_is_said(tmp_path: Path) -> None:
    settings = FinetuneConfig(learning_rate=1e30, batch_size=16, clip_grad=None)
    with pytest.raises(RunError, match=r"\(nan\): the training loss became.*lower finetune.learning_rate"):
        Trained(tmp_path, replace(STUDY, finetune=settings))


def test_progress_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report = LiveReport(STUDY, "here", console=Console(width=120), plain=True)
    report(SupernetTrained(1200, 12000, 3.0))
    assert capsys.readouterr().out.startswith("shared weights: 1,200 of 12,000 images")


# --- candidates ----------------------------------------------------------------------------------------------------


def candidate(config: StudyConfig, schedule: Schedule, images: int = 0) -> Task:
    record = Record(7, "abc", schedule, "complete", "sampler", seed=3)
    return replace(candidate_task(record, config, Budget(images=images)), metrics=("top1", "agreement", "gmacs"))


def moved(folder: Path, config: StudyConfig = STUDY) -> str:
    """Weights of the same shapes with another head."""
    state = {name: value.clone() for name, value in build_model(config.model).state_dict().items()}
    state["head.bias"][3] += 100.0
    save_file(state, folder / "moved.safetensors")
    return str(folder / "moved.safetensors")


def test_candidates_begin_with_the_shared_weights_but_agree_with_the_original(tmp_path: Path) -> None:
    plain = candidate(STUDY, Schedule())
    shared = replace(plain, start=moved(tmp_path))
    assert evaluate(plain).value("agreement") == 100
    evaluation = evaluate(shared)
    assert evaluation.start == shared.start
    labels = [label for _, label in open_data(STUDY.data, build_model(SMALL))[1].source]
    assert evaluation.value("top1") == pytest.approx(100 * sum(label == 3 for label in labels) / len(labels))
    assert evaluation.value("agreement") < 100
    assert evaluate(plain).value("agreement") == 100
    assert not same_work(plain, shared) and same_work(shared, replace(shared, start="/elsewhere.safetensors"))


def test_a_fine_tune_of_its_own_begins_with_them_and_learns_from_the_original(tmp_path: Path) -> None:
    settings = replace(STUDY.finetune, learning_rate=0.0)
    task = candidate(replace(STUDY, finetune=settings), Schedule((Stage(0, keep=0.5),)), images=32)
    task = replace(task, start=moved(tmp_path), save_to=str(tmp_path / "own"))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        finetune = module.take_steps.__globals__["distillation_loss"]
        patch.setitem(module.take_steps.__globals__, "distillation_loss", lambda *a: seen.append(a[2]) or finetune(*a))
        assert evaluate(task).status == "complete"
    assert torch.equal(load_file(tmp_path / "own.safetensors")["head.bias"], load_file(task.start)["head.bias"])
    assert all(target.abs().max() < 50 for target in seen) and seen


def test_another_file_of_the_same_name_is_read_again_and_a_missing_one_is_said(tmp_path: Path) -> None:
    path = moved(tmp_path)
    assert build_model(SMALL, start=path).head.bias[3] > 50
    save_file(build_model(SMALL).state_dict(), path)
    assert build_model(SMALL, start=path).head.bias[3] < 50
    Path(path).unlink()
    evaluation = evaluate(replace(candidate(STUDY, Schedule()), start=path))
    assert (evaluation.status, evaluation.cause) == ("failed", "error")
    assert "moved.safetensors': cannot be read" in evaluation.error


def test_tasks_and_evaluations_round_trip(tmp_path: Path) -> None:
    task = replace(supernet_task(STUDY, tmp_path), start="/s.safetensors")
    assert from_mapping(Task, json.loads(json.dumps(to_mapping(task))), "task") == task
    evaluation = Evaluation("u", "complete", start="/s.safetensors")
    assert from_mapping(Evaluation, to_mapping(evaluation), "evaluation") == evaluation
    assert from_mapping(StudyConfig, to_mapping(STUDY), "study") == STUDY


# --- study files and export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": "finetune"}, "supernet: given, but evaluation is finetune"),
        ({"supernet": None}, "supernet: missing"),
        ({"space": replace(SPACE, score=("class_attention", "predictor"))}, "space: predictor in a study"),
        ({"space": replace(SPACE, reduce=("drop", "pool"))}, "space: pool in a study"),
        (
            {"space": replace(SPACE, reduce="drop", amount=("threshold",), threshold=ThresholdRange(0.001, 0.01))},
            "space: thresholds in a study",
        ),
        ({"space": replace(SPACE, start_from=("asvit-0.65",))}, "space.start_from[0]: asvit-0.65 learns"),
        ({"finetune": FinetuneConfig(freeze_backbone=0.5)}, "finetune.freeze_backbone: 0.5"),
    ],
)
def test_what_cannot_share_weights_is_refused(changes: dict, said: str) -> None:
    config = replace(STUDY, model=ModelConfig("vit_digits_patch1_8"), **changes)
    assert any(said in problem and "Possible: " in problem for problem in study_problems(config)), study_problems(
        config
    )


def test_a_study_that_shares_is_without_problems() -> None:
    assert study_problems(STUDY) == []


def finished(folder: Path, start: str, images: int) -> Record:
    schedule = Schedule((Stage(1, keep=0.5),))
    record = Record(7, "abc", schedule, "complete", "sampler", seed=3)
    evaluations = []
    for rung in (0, images) if images else (0,):
        task = replace(candidate_task(record, STUDY, Budget(images=rung)), start=start, metrics=("top1",))
        evaluations.append(evaluate(replace(task, save_to=str(folder / "weights" / "own") if rung else None)))
    return replace(record, evaluations=tuple(evaluations))


def test_a_study_measures_all_with_them_and_trains_winners_from_them(tmp_path: Path) -> None:
    storage = f"journal:{tmp_path / 'study.log'}"
    config = replace(STUDY, stop=StopConfig(trials=7), promote=2, sampler=SamplerConfig("random"))
    events: list[Event] = []
    done = run_study(config, tmp_path, storage=storage, on_event=events.append)
    assert [event.images for event in events if isinstance(event, SupernetTrained)][-1] == 100
    reader = open_study_readonly(storage=storage)
    records = reader.records()
    reader.close()
    assert done.complete + done.paused == len(records) == 7
    evaluations = [evaluation for record in records for evaluation in record.evaluations]
    assert {evaluation.start for evaluation in evaluations} == {shared_weights(config.evaluation, tmp_path)}
    winners = [record for record in records if record.rung_done == 1]
    assert winners and all(record.evaluation.images == 32 for record in winners)
    saved = {path.name for path in (tmp_path / "weights").iterdir()}
    assert saved >= {"supernet.safetensors", *(f"{record.uid}.1.safetensors" for record in winners)}


@pytest.mark.parametrize("images", [0, 32])
def test_weights_of_a_winner_are_copied_or_made_again(tmp_path: Path, images: int) -> None:
    start = str(Trained(tmp_path).path)
    record = finished(tmp_path, start, images)
    kept = load_file(tmp_path / "weights" / ("own.safetensors" if images else "supernet.safetensors"))
    said: list[str] = []
    schedule, weights = export(record, STUDY, tmp_path / "a" / "best.yaml", weights=True, say=said.append)
    assert said == []
    copied = load_file(weights)
    assert all(torch.equal(copied[name], value) for name, value in kept.items())
    assert load_schedule_file(schedule).measured["supernet_images"] == 100
    assert evaluate(replace(candidate(STUDY, record.schedule), weights=str(weights), metrics=("top1",))).value(
        "top1"
    ) == record.evaluation.value("top1")

    for path in (tmp_path / "weights").iterdir():
        path.unlink()
    _, weights = export(record, STUDY, tmp_path / "b" / "best.yaml", weights=True, say=said.append)
    assert "the shared weights are not in the study any more" in "".join(said)
    again = load_file(weights)
    assert all(torch.equal(again[name], value) for name, value in kept.items())
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["best.safetensors", "best.yaml"]
