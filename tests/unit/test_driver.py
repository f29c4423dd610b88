"""The search loop: nothing twice, nothing lost, the same candidates after any kill; and how a run ends."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_search
import pytest
import timm
import torch
from dying import STEPS, Killed, die_at
from fake_search import EVALUATED, RUNGS, SPACE, finished, records, run, small_study, study
from optuna.storages import JournalStorage
from safetensors.torch import save_model

from prunesearch.config import (
    Budget,
    DataConfig,
    Limit,
    ModelConfig,
    Objective,
    SpaceConfig,
    StopConfig,
    StudyConfig,
    WorkersConfig,
)
from prunesearch.cost import estimate_cost
from prunesearch.errors import DataError, FileError, ModelError, RunError, StudyError
from prunesearch.evaluate import model_shape
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import load_study, save_schedule
from prunesearch.record import Record
from prunesearch.samplers import optuna_samplers
from prunesearch.schedule import Schedule, Stage
from prunesearch.search import driver, loop
from prunesearch.search.events import Done, Finished, Started, Stopping, Submitted
from prunesearch.workers.protocol import Lost, Outcome
from prunesearch.workers.serial import SerialWorkers


@pytest.fixture(autouse=True)
def nothing_evaluated_yet() -> None:
    EVALUATED.clear()


def test_dense_first_then_start_schedules_then_the_sampler(tmp_path: Path) -> None:
    save_schedule(Schedule((Stage(3, keep=0.5),)), tmp_path / "mine.yaml")
    space = replace(SPACE, start_from=("evit-0.7", str(tmp_path / "mine.yaml")))
    done, events = run(study(6, space=space), tmp_path)
    found = records(tmp_path)
    assert [record.origin for record in found[:4]] == [
        "dense",
        "start: evit-0.7",
        f"start: {tmp_path / 'mine.yaml'}",
        "sampler",
    ]
    assert found[0].schedule == Schedule()
    assert (done.reason, done.complete, len(found), len(EVALUATED)) == ("trials", 6, 6, 6)
    assert [type(event) for event in events[:4]] == [Started, Submitted, Finished, Submitted]
    assert [event.record.number for event in finished(events)] == list(range(6))
    assert load_study(tmp_path / "study.yaml") == study(6, space=space)
    assert not list((tmp_path / "outbox").iterdir())


def test_start_schedules_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path) -> None:
    save_schedule(Schedule((Stage(11, keep=0.5),)), tmp_path / "deep.yaml")
    space = replace(SPACE, start_from=(str(tmp_path / "deep.yaml"),))
    with pytest.raises(FileError, match=r"space.start_from\[0\].*block 11.*blocks 0 to 7"):
        run(study(space=space), tmp_path)
    assert not EVALUATED


SEARCHES = (("auto", 3), ("random", 1), ("tpe", 3), ("nsga2", 1), ("nsga2", 3), ("tpe", 1))


@pytest.mark.parametrize(
    ("sampler", "rungs", "step"),
    [
        # each step with one of two searches; the other combinations are slow tests
        pytest.param(*search, step, marks=() if index % 2 == place else pytest.mark.slow)
        for index, step in enumerate(STEPS)
        for place, search in enumerate(SEARCHES)
    ],
)
def test_a_kill_at_any_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, rungs: int, step: str
) -> None:
    config, expected = undisturbed(sampler, rungs)
    EVALUATED.clear()
    for time in (3, 9):
        die_at(monkeypatch, step, time)
        with pytest.raises(Killed):
            run(config, tmp_path / "killed")
    monkeypatch.undo()
    run(config, tmp_path / "killed")
    found = records(tmp_path / "killed")
    assert [whole(record) for record in found] == expected
    assert {record.state for record in found} == ({"complete"} if rungs == 1 else {"complete", "paused"})
    assert sorted(EVALUATED) == sorted(record.uid for record in found for _ in record.evaluations)  # each once
    assert not list((tmp_path / "killed" / "outbox").iterdir())


@functools.cache
def undisturbed(sampler: str, rungs: int) -> tuple[StudyConfig, list[object]]:
    """Result of a study without a kill."""
    config = study(18, sampler)
    config = replace(config, sampler=replace(config.sampler, startup=6)) if rungs == 1 else small_study(18, sampler)
    with tempfile.TemporaryDirectory() as folder:
        run(config, Path(folder))
        return config, [whole(record) for record in records(Path(folder))]


def whole(record: Record) -> tuple[object, ...]:
    """What must not depend on kills: candidate, number, and the results at each rung."""
    budgets = [(evaluation.rung, evaluation.metrics) for evaluation in record.evaluations]
    return record.number, record.uid, record.schedule, record.state, record.orders, budgets


def test_continuing_says_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_at(monkeypatch, "delivered", 4)
    with pytest.raises(Killed):
        run(study(8), tmp_path)
    monkeypatch.undo()
    _, events = run(study(8), tmp_path)
    started = events[0]
    assert isinstance(started, Started)
    assert (started.total, started.done, started.recovered, started.rerun) == (8, 4, 1, 0)
    _, events = run(study(9), tmp_path)  # `trials` is the total
    assert len(finished(events)) == 1


def test_a_finished_study_starts_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(study(3), tmp_path)
    monkeypatch.setattr(driver, "_start_workers", None)
    done, events = run(study(2), tmp_path)
    assert (done.reason, done.complete) == ("trials", 3)
    assert [type(event) for event in events] == [Started, Done]


def test_a_candidate_that_was_running_runs_again_under_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(workers: SerialWorkers, seconds: float) -> list[Outcome]:
        raise Killed

    run(study(3), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SerialWorkers, "wait", die)
        run(study(6), tmp_path)
    running = records(tmp_path)[-1]
    assert running.state == "running"
    _, events = run(study(6), tmp_path)
    assert isinstance(events[0], Started) and events[0].rerun == 1
    again = finished(events)[0]
    assert (again.record.number, again.record.uid, again.evaluation.attempt) == (3, running.uid, 1)


def test_same_seed_same_candidates(tmp_path: Path) -> None:
    uids = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(study(15, "tpe", seed), tmp_path / name)
        uids.append([record.uid for record in records(tmp_path / name)])
    assert uids[0] == uids[1] != uids[2]
    assert len({record.seed for record in records(tmp_path / "a")}) == 15


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "gp"])
def test_a_small_space_is_searched_to_the_last_candidate(tmp_path: Path, sampler: str) -> None:
    space = SpaceConfig(blocks=(2, 4), keep=(0.5, 0.75, 1.0), reduce=("drop", "merge"), max_stages=1)
    done, events = run(study(100, sampler, space=space), tmp_path)
    assert done.reason == "exhausted" and done.complete == 9 == len(EVALUATED) == len(set(EVALUATED))
    assert "no further candidate was found" in str(events[-3:])


def test_candidates_over_a_limit_cost_nothing(tmp_path: Path) -> None:
    limit = 0.0085
    done, _ = run(study(20, "tpe", limits=(("gmacs", Limit(at_most=limit)),)), tmp_path)
    dense, *others = records(tmp_path)
    assert dense.evaluation is not None and dense.evaluation.value("gmacs") > limit  # evaluated all the same
    assert all(record.evaluation is not None and record.evaluation.value("gmacs") <= limit for record in others)
    assert done.rejected > 0 and len(EVALUATED) == 20


def test_limits_that_hardly_any_candidate_keeps_end_the_search(tmp_path: Path) -> None:
    cheapest = Schedule(tuple(Stage(block, keep=0.5, reduce="drop") for block in range(1, 6)))
    least = estimate_cost(model_shape(study().model), cheapest).gmacs
    space = replace(SPACE, score=("class_attention",), reduce=("drop",))
    done, _ = run(study(20, space=space, limits=(("gmacs", Limit(at_most=least)),)), tmp_path)
    assert (done.reason, done.complete) == ("exhausted", 2)  # the dense model, and the only one that keeps it


def test_values_that_are_not_finite_fail(tmp_path: Path) -> None:
    done, _ = run(study(9), tmp_path, "evaluate_to_infinity")
    failed = [record for record in records(tmp_path) if record.state == "failed"]
    assert (done.complete, done.failed) == (6, 3)
    assert [record.evaluation.cause for record in failed if record.evaluation] == ["nan"] * 3


def test_metrics_that_were_not_measured_fail(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="metric top5 was not measured"):
        run(study(3, objectives=(Objective("top5", "maximize"),)), tmp_path)


def test_nobody_wants_two_hundred_identical_failures(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"5 of 5 failed.*too large.*\nTraceback"):
        run(study(200), tmp_path, "evaluate_without_memory")
    assert len(records(tmp_path)) == loop.HOPELESS
    done, _ = run(study(10), tmp_path)  # with the cause removed the study continues
    assert (done.complete, done.failed) == (5, 5)


def test_without_the_dense_model_there_is_nothing_to_search(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"1 of 1 failed.*no such luck"):
        run(study(200), tmp_path, evaluate="evaluate_in_vain")
    [dense] = records(tmp_path)
    assert (dense.origin, dense.state) == ("dense", "failed")


def test_files_that_are_not_there_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.root: '/nowhere' is not there"):
        run(study(data=DataConfig("folder", root="/nowhere")), tmp_path / "a")
    with pytest.raises(DataError, match=r"unknown data set 'digts'.*digits"):
        run(study(data=DataConfig("digts")), tmp_path / "a")
    with pytest.raises(ModelError, match=r"'gone.safetensors': there is no such file"):
        run(study(model=ModelConfig("vit_digits_patch1_8", checkpoint="gone.safetensors")), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_study_goes_on_with_the_weights_that_it_began_with(tmp_path: Path) -> None:
    """Results of other weights do not compare, even when the file has the same name."""
    file = tmp_path / "weights.safetensors"
    config = study(2, model=ModelConfig("vit_digits_patch1_8", checkpoint=str(file)))

    def write(seed: int) -> None:
        torch.manual_seed(seed)
        save_model(timm.create_model("vit_digits_patch1_8"), str(file))

    write(0)
    assert run(config, tmp_path / "a")[0].complete == 2
    more = replace(config, stop=StopConfig(trials=3))
    write(1)
    with pytest.raises(StudyError, match=r"weights.safetensors has other weights now \(\w+\) than .*Put it back"):
        run(more, tmp_path / "a")
    write(0)
    assert run(more, tmp_path / "a")[0].complete == 3


def test_results_of_other_images_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, images = fake_search.evaluate, ["9:aaa 3:bbb"]

    def with_images(task: Task) -> Evaluation:
        found = original(task)
        return replace(found, versions=(*found.versions, ("data", images[0])))

    monkeypatch.setattr(fake_search, "evaluate", with_images)
    run(study(3), tmp_path)
    assert not caplog.records
    images[0] = "8:ccc 3:bbb"
    run(study(6), tmp_path)
    [said] = [record.message for record in caplog.records]
    assert "trial 3 was measured with other images" in said and "8:ccc 3:bbb, before 9:aaa 3:bbb" in said


def test_the_first_interrupt_finishes_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(task: Task) -> Evaluation:
        if len(EVALUATED) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(task)

    original = fake_search.evaluate
    monkeypatch.setattr(fake_search, "evaluate", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    done, events = run(study(9), tmp_path)
    assert (done.reason, done.complete, done.running) == ("interrupted", 4, 0)
    assert [event.reason for event in events if isinstance(event, Stopping)] == ["interrupted"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_interrupt_leaves_it_for_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(task: Task) -> Evaluation:
        if len(EVALUATED) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(task)

    original = fake_search.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(fake_search, "evaluate", interrupt)
        done, events = run(study(9), tmp_path)
    assert (done.reason, done.complete, done.running) == ("cancelled", 3, 1)
    assert isinstance(events[-1], Done)
    done, _ = run(study(9), tmp_path)
    assert (done.complete, done.running, len(EVALUATED)) == (9, 0, 9)


def test_hours_bound_this_run(tmp_path: Path) -> None:
    done, _ = run(study(None, stop=StopConfig(trials=None, hours=1e-9)), tmp_path)
    assert done.reason == "hours" and done.running == 0


def test_only_one_driver_at_a_time(tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held'); f.write('x:1')"
    command = [sys.executable, "-c", f"{hold}; f.flush(); sys.stdout.flush(); sys.stdin.read()", str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match=r"another process .* runs this study"):
            run(study(2), tmp_path)
        other.kill()  # as with kill -9, the kernel releases the lock
    assert run(study(2), tmp_path)[0].complete == 2


def test_a_study_file_is_checked_before_anything_runs(tmp_path: Path) -> None:
    crooked = study(
        space=replace(SPACE, blocks=(9,)),
        objectives=(Objective("accuracy", "maximize"),),
        limits=(("gmac", Limit(at_most=1)),),
        metrics=("latency",),
        rungs=(Budget(images=10), Budget(images=10), Budget(images=20, seconds=5.0)),
    )
    crooked = replace(crooked, sampler=replace(crooked.sampler, name="tpee"))
    with pytest.raises(FileError) as caught:
        run(crooked, tmp_path / "study")
    for expected in (
        "space.blocks[0]",
        "objectives[0].metric: unknown metric 'accuracy'",
        "limits.gmac: ",
        "metrics[0]",
        "rungs: 10, 10, 20 images do not ascend",
        "rungs[2]: 20 images and 5 seconds, but seconds",
        'Did you mean "tpe"?',
    ):
        assert expected in str(caught.value)
    assert not (tmp_path / "study").exists()


def test_gp_is_refused_where_it_would_crawl(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"stop\.trials: 201, but gp takes several seconds .* up to 200"):
        run(study(201, "gp"), tmp_path)


def test_an_evaluation_that_raises_is_a_failed_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_once(task: Task) -> Evaluation:
        if len(EVALUATED) == 1:
            EVALUATED.append(task.uid)
            raise ArithmeticError("oops")
        return original(task)

    original = fake_search.evaluate
    monkeypatch.setattr(fake_search, "evaluate", fail_once)
    done, events = run(study(3), tmp_path)
    assert (done.complete, done.failed) == (2, 1)
    assert finished(events)[1].evaluation.error == "ArithmeticError: oops"


def test_a_full_disk_is_nobodys_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(task: Task) -> Evaluation:
        if len(EVALUATED) == 3:
            return Evaluation(task.uid, "failed", cause="disk", error="No space left on device")
        return original(task)

    original = fake_search.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(fake_search, "evaluate", fill)
        with pytest.raises(RunError, match=r"could not write .No space left on device.*Free some space"):
            run(study(9), tmp_path)
    assert [record.state for record in records(tmp_path)] == ["complete"] * 3 + ["running"]
    done, _ = run(study(9), tmp_path)
    assert (done.complete, done.failed) == (9, 0)


def test_a_study_needs_its_start_files_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_schedule(Schedule((Stage(3, keep=0.5),)), tmp_path / "mine.yaml")
    config = study(6, space=replace(SPACE, start_from=("evit-0.7", str(tmp_path / "mine.yaml"))))
    die_at(monkeypatch, "before discarding", 1)
    with pytest.raises(Killed):
        run(config, tmp_path)
    monkeypatch.undo()
    (tmp_path / "mine.yaml").unlink()
    done, _ = run(config, tmp_path)
    assert done.complete == 6 and records(tmp_path)[2].schedule == Schedule((Stage(3, keep=0.5),))


def test_tasks_carry_what_the_study_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(task: Task) -> Evaluation:
        tasks.append(task)
        return original(task)

    tasks: list[Task] = []
    original = fake_search.evaluate
    monkeypatch.setattr(fake_search, "evaluate", keep)
    workers = WorkersConfig(kind="serial", cpus_each=2.5, device="cpu")
    run(study(2, rungs=(Budget(images=640),), metrics=("latency_ms",), workers=workers), tmp_path)
    run(study(1, name="as it comes"), tmp_path)
    trained, _, as_it_comes = tasks
    assert (trained.threads, trained.device, trained.metrics) == (2, "cpu", ("top1", "gmacs", "latency_ms"))
    assert trained.save_to == str(tmp_path / "weights" / f"{trained.uid}.0") and trained.budget == Budget(images=640)
    assert as_it_comes.save_to is None and as_it_comes.threads == 1


# --- several rungs -----------------------------------------------------------------------------------------------


def at_rung(found: list[Record], rung: int) -> list[Record]:
    return [record for record in found if record.at(rung) is not None]


def test_the_best_go_on_from_their_checkpoints_and_anchors_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Task] = []
    original = fake_search.evaluate
    monkeypatch.setattr(fake_search, "evaluate", lambda task: tasks.append(task) or original(task))
    config = small_study(20)
    config = replace(config, promote=3, space=replace(config.space, start_from=("evit-0.7",)))
    done, events = run(config, tmp_path)
    found = records(tmp_path)
    counts = [len(at_rung(found, rung)) for rung in range(3)]
    assert counts[0] == 20 and 7 <= counts[1] <= 11 and 3 <= counts[2] <= 6
    assert [record.rung for record in found if record.is_start] == [2, 2]
    assert (done.complete, done.paused, done.running) == (counts[2], 20 - counts[2], 0)
    assert [task.rung for task in tasks[:6]] == [0, 1, 2] * 2  # dense and the start schedule, at once
    for task in tasks:
        assert task.budget == RUNGS[task.rung] and task.attempt == 0
        weights = tmp_path / "weights" / task.uid
        assert task.save_to == (f"{weights}.{task.rung}" if task.rung else None)
        assert task.resume_from == (f"{weights}.1" if task.rung == 2 else None)  # rung 0 trains nothing
    assert [event.record.rung for event in events if isinstance(event, Submitted)] == [task.rung for task in tasks]
    assert all(event.record.state in ("paused", "complete") for event in finished(events))


def test_weights_that_are_gone_are_trained_again_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    die_at(monkeypatch, "discarded", 2)
    with pytest.raises(Killed):
        run(small_study(1), tmp_path)
    monkeypatch.undo()
    for path in (tmp_path / "weights").iterdir():
        path.unlink()
    tasks: list[Task] = []
    original = fake_search.evaluate
    monkeypatch.setattr(fake_search, "evaluate", lambda task: tasks.append(task) or original(task))
    run(small_study(1), tmp_path)
    assert [(task.rung, task.resume_from) for task in tasks] == [(2, None)]
    assert "rung 2 trains from the start" in caplog.text


def test_a_study_with_more_trials_goes_on_with_those_that_waited(tmp_path: Path) -> None:
    run(small_study(10), tmp_path)
    before = {record.uid: record for record in records(tmp_path)}
    done, events = run(small_study(10), tmp_path)
    assert [type(event) for event in events] == [Started, Done]  # no candidate qualifies for a promotion
    assert done.reason == "trials" and done.paused > 0
    EVALUATED.clear()
    run(small_study(24), tmp_path)
    after = {record.uid: record for record in records(tmp_path)}
    assert any(before[uid].state == "paused" and after[uid].rung > before[uid].rung for uid in before)
    assert all(after[uid].evaluations[: len(one.evaluations)] == one.evaluations for uid, one in before.items())
    assert len(EVALUATED) == sum(len(record.evaluations) for record in after.values()) - sum(
        len(record.evaluations) for record in before.values()
    )


def test_a_finished_search_that_still_owes_a_promotion_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small_study(10), tmp_path / "whole")
    total = len(EVALUATED)
    die_at(monkeypatch, "written", total - 1)
    with pytest.raises(Killed):
        run(small_study(10), tmp_path / "killed")
    monkeypatch.undo()
    EVALUATED.clear()
    run(small_study(10), tmp_path / "killed")
    assert len(EVALUATED) == 1
    assert [whole(one) for one in records(tmp_path / "killed")] == [whole(one) for one in records(tmp_path / "whole")]


@pytest.mark.parametrize("call", ["set_trial_user_attr", "set_trial_state_values", "create_new_trial"])
def test_a_kill_between_two_commits_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    run(small_study(9), tmp_path / "whole")
    EVALUATED.clear()
    done = False
    for time in itertools.count(2, 4):
        with monkeypatch.context() as patch:
            die_in_storage(patch, call, time)
            try:
                run(small_study(9), tmp_path / "killed")
                done = True
            except Killed:
                continue
        break
    assert done
    found = records(tmp_path / "killed")
    assert [whole(one) for one in found] == [whole(one) for one in records(tmp_path / "whole")]
    assert sorted(EVALUATED) == sorted(record.uid for record in found for _ in record.evaluations)


def die_in_storage(monkeypatch: pytest.MonkeyPatch, call: str, time: int) -> None:
    """Raise Killed in place of the `time`-th call of a storage method for a trial."""
    original, times = getattr(JournalStorage, call), 0

    def counted(*arguments: object, **keywords: object) -> object:
        nonlocal times
        times += 1
        if times == time:
            raise Killed
        return original(*arguments, **keywords)

    monkeypatch.setattr(JournalStorage, call, counted)


def test_the_sampler_learns_from_one_rung_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[optuna_samplers.ModelStudy, str, float]] = []

    class Spy(optuna_samplers.ModelStudy):
        def tell(self, uid: str, values: Any, excess: Any) -> None:
            if values is not None:
                told.append((self, uid, values[0]))
            super().tell(uid, values, excess)

    monkeypatch.setattr(optuna_samplers, "ModelStudy", Spy)
    run(small_study(24), tmp_path)
    measured = {(record.uid, one.rung): one.value("top1") for record in records(tmp_path) for one in record.evaluations}
    models = list(dict.fromkeys(model for model, *_ in told))
    assert len(models) >= 2  # it started over
    for rung, model in enumerate(models):
        assert all(value == measured[uid, rung] for its, uid, value in told if its is model)


def test_a_failure_at_a_higher_rung_is_that_candidates_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_later(task: Task) -> Evaluation:
        if task.rung == 1 and len(EVALUATED) > 8:
            return Evaluation(task.uid, "failed", 1, cause="oom", error="too large")
        return original(task)

    original = fake_search.evaluate
    monkeypatch.setattr(fake_search, "evaluate", fail_later)
    done, _ = run(small_study(14), tmp_path)
    failed = [record for record in records(tmp_path) if record.state == "failed"]
    assert len(failed) == done.failed > 0 and len(records(tmp_path)) == 14
    for record in failed:
        assert [one.status for one in record.evaluations] == ["complete", "failed"] and record.rung == 1


def test_a_rung_where_nothing_works_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fake_search.evaluate
    broken = Evaluation("", "failed", 1, cause="error", error="no gradient")
    monkeypatch.setattr(
        fake_search, "evaluate", lambda task: replace(broken, uid=task.uid) if task.rung == 1 else original(task)
    )
    with pytest.raises(RunError, match=r"evaluated at rung 1: 1 of 1 failed.*no gradient"):  # the dense model
        run(small_study(30), tmp_path)


class Pool:
    """Several workers that finish in a different order."""

    count, description = 3, "three"

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.busy: list[int] = []

    def submit(self, task: Task) -> None:
        assert len(self.tasks) < self.count
        self.tasks.append(task)

    def wait(self, seconds: float) -> list[Outcome]:
        self.busy.append(len(self.tasks))
        task = self.tasks.pop(sum(self.busy) % len(self.tasks))
        return [(task, fake_search.evaluate(task))]

    def close(self) -> None:
        return None


def test_no_worker_waits_for_a_promotion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    monkeypatch.setattr(driver, "_start_workers", lambda *arguments: pool)
    done, events = run(small_study(20), tmp_path)
    found = records(tmp_path)
    assert (len(found), done.running) == (20, 0)
    assert [len(record.evaluations) - 1 for record in found] == [record.rung for record in found]
    new = sum(isinstance(event, Submitted) and event.record.rung == 0 for event in events)
    begun = [event for event in events if isinstance(event, Submitted)]
    last_new = max(index for index, event in enumerate(begun) if event.record.rung == 0)
    assert new == 20 and set(pool.busy[: last_new - 2]) == {3}  # no worker is idle while there are new candidates


def test_a_dead_worker_costs_one_attempt_at_its_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(Pool):
        count = 1

        def wait(self, seconds: float) -> list[Outcome]:
            if [task.rung for task in self.tasks] == [1] and self.tasks[0].attempt == 0:
                return [(self.tasks.pop(), Lost("crash", "killed"))]
            tasks.extend(self.tasks)
            return super().wait(seconds)

    tasks: list[Task] = []
    monkeypatch.setattr(driver, "_start_workers", lambda *arguments: Dying())
    done, _ = run(small_study(1), tmp_path)
    assert done.complete == 1
    assert [(task.rung, task.attempt) for task in tasks] == [(0, 0), (1, 1), (2, 0)]
    assert tasks[-1].resume_from == str(tmp_path / "weights" / f"{tasks[0].uid}.1")
