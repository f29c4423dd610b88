"""The loop: nothing twice, nothing lost, the same candidates whatever happens; and how a run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_search
import pytest
from fake_search import EVALUATED, SPACE, finished, records, run, study

from prunesearch.config import Budget, DataConfig, Limit, ModelConfig, Objective, SpaceConfig, StopConfig, WorkersConfig
from prunesearch.errors import DataError, FileError, ModelError, ResourceError, RunError, StudyError
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import load_study, save_schedule
from prunesearch.schedule import Schedule, Stage
from prunesearch.search import driver
from prunesearch.search.events import Done, Started, Stopping, Submitted


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the driver handles it."""


@pytest.fixture(autouse=True)
def nothing_evaluated_yet() -> None:
    EVALUATED.clear()


def die_at(monkeypatch: pytest.MonkeyPatch, step: str, time: int) -> None:
    """Die when the loop reaches a step for the time-th time."""
    times = 0

    def reached(here: str) -> None:
        nonlocal times
        times += here == step
        if times == time and here == step:
            raise Killed

    monkeypatch.setattr(driver, "reached", reached)


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
    assert [type(event) for event in events[:3]] == [Started, Submitted, Submitted]
    assert [event.record.number for event in finished(events)] == list(range(6))
    assert load_study(tmp_path / "study.yaml") == study(6, space=space)
    assert not list((tmp_path / "outbox").iterdir())


def test_start_schedules_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path) -> None:
    save_schedule(Schedule((Stage(11, keep=0.5),)), tmp_path / "deep.yaml")
    space = replace(SPACE, start_from=(str(tmp_path / "deep.yaml"),))
    with pytest.raises(FileError, match=r"space.start_from\[0\].*block 11.*blocks 0 to 7"):
        run(study(space=space), tmp_path)
    assert not EVALUATED


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
@pytest.mark.parametrize("step", ["result", "submitted", "finished", "begun", "discarded"])
def test_a_kill_at_any_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, step: str
) -> None:
    config = study(18, sampler)
    config = replace(config, sampler=replace(config.sampler, startup=6))
    run(config, tmp_path / "whole")
    expected = [(record.number, record.uid, record.schedule) for record in records(tmp_path / "whole")]
    EVALUATED.clear()
    for time in (3, 9):
        die_at(monkeypatch, step, time)
        with pytest.raises(Killed):
            run(config, tmp_path / "killed")
    monkeypatch.undo()
    run(config, tmp_path / "killed")
    found = records(tmp_path / "killed")
    assert [(record.number, record.uid, record.schedule) for record in found] == expected
    assert {record.state for record in found} == {"complete"}
    assert sorted(EVALUATED) == sorted({record.uid for record in found})  # each once
    assert not list((tmp_path / "killed" / "outbox").iterdir())


def test_continuing_says_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_at(monkeypatch, "submitted", 4)
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
    def die(task: Task) -> Evaluation:
        raise Killed

    run(study(3), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fake_search, "evaluate", die)
        run(study(6), tmp_path)
    running = records(tmp_path)[-1]
    assert running.state == "running"
    _, events = run(study(6), tmp_path)
    assert isinstance(events[0], Started) and events[0].rerun == 1
    again = finished(events)[0]
    assert (again.record.number, again.record.uid, again.evaluation.attempt) == (3, running.uid, 1)


def test_the_same_seed_gives_the_same_candidates_and_another_one_others(tmp_path: Path) -> None:
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
    assert "no further candidate" in str(events[-3:])


def test_candidates_over_a_limit_cost_nothing(tmp_path: Path) -> None:
    limit = 0.0085
    done, _ = run(study(20, "tpe", limits=(("gmacs", Limit(at_most=limit)),)), tmp_path)
    dense, *others = records(tmp_path)
    assert dense.evaluation is not None and dense.evaluation.value("gmacs") > limit  # evaluated all the same
    assert all(record.evaluation is not None and record.evaluation.value("gmacs") <= limit for record in others)
    assert done.rejected > 0 and len(EVALUATED) == 20


def test_impossible_limits_end_the_search(tmp_path: Path) -> None:
    done, _ = run(study(20, limits=(("gmacs", Limit(at_most=0.001)),)), tmp_path)
    assert (done.reason, done.complete) == ("exhausted", 1)


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
    assert len(records(tmp_path)) == driver.HOPELESS
    done, _ = run(study(10), tmp_path)  # mended: it goes on
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
        other.kill()  # as with kill -9 of a driver, the kernel gives the lock back
    assert run(study(2), tmp_path)[0].complete == 2


def test_a_study_file_is_checked_before_anything_runs(tmp_path: Path) -> None:
    crooked = study(
        space=replace(SPACE, blocks=(9,)),
        objectives=(Objective("accuracy", "maximize"),),
        limits=(("gmac", Limit(at_most=1)),),
        metrics=("latency",),
        rungs=(Budget(images=0), Budget(images=1)),
    )
    crooked = replace(crooked, sampler=replace(crooked.sampler, name="tpee"))
    with pytest.raises(FileError) as caught:
        run(crooked, tmp_path / "study")
    for expected in (
        "space.blocks[0]",
        "objectives[0].metric: unknown metric 'accuracy'",
        "limits.gmac: ",
        "metrics[0]",
        "rungs: there are 2",
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


def test_what_only_other_processes_can_do_is_refused_for_serial(tmp_path: Path) -> None:
    for changes in ({"count": 4}, {"timeout": 5.0}):
        with pytest.raises(ResourceError, match=f"workers.{next(iter(changes))}: .* kind: ray"):
            run(study(workers=WorkersConfig(kind="serial", **changes)), tmp_path)


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
    assert trained.save_to == str(tmp_path / "weights" / trained.uid) and trained.budget == Budget(images=640)
    assert as_it_comes.save_to is None and as_it_comes.threads == 1
