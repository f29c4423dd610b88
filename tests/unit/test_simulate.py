"""Replay: tables of evaluations, the surrogate, and searches on both."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_search import SHAPE, study

from prunesearch.config import Budget, SpaceConfig, StudyConfig, WorkersConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import FileError, RunError, ScheduleError, StudyError
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.replay.surrogate import Surrogate
from prunesearch.replay.table import Recorded, Table, read_table
from prunesearch.replay.workers import Failures, SimulatedTask, SimulatedWorkers, seconds_of
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.driver import run_study
from prunesearch.search.events import Done
from prunesearch.space.choices import uid_of
from prunesearch.strict import to_mapping
from prunesearch.workers.protocol import Lost

DENSE, HALF, MOST = Schedule(), Schedule((Stage(2, keep=0.5),)), Schedule((Stage(2, keep=0.75),))
SECONDS = {DENSE: (1.0, 4.0, 9.0), HALF: (0.5, 2.0, 5.0), MOST: (0.75, 3.0, 7.0)}
TOP1 = {DENSE: (97.0, 97.0, 97.5), HALF: (80.0, 90.0, 95.0), MOST: (90.0, 94.0, 96.0)}
BUDGETS = (0, 640, 2560)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(schedule: Schedule, rung: int, top1: float, seconds: float) -> dict[str, object]:
    return {
        "uid": uid_of(schedule, SHAPE),
        "rung": rung,
        "images": BUDGETS[rung],
        "top1": top1,
        "gmacs": estimate_cost(SHAPE, schedule).gmacs,
        "seconds": seconds,
        "schedule": json.dumps(to_mapping(schedule).get("stages", [])),
    }


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """A table with all three schedules of the space of `small`, at three rungs."""
    rows = [row(one, rung, TOP1[one][rung], SECONDS[one][rung]) for one in SECONDS for rung in range(3)]
    return read_table(write(tmp_path / "table.csv", rows), SHAPE)


def small(**changes: Any) -> StudyConfig:
    space = SpaceConfig(blocks=(2,), keep=(0.5, 0.75, 1.0))
    return study(3, "random", space=space, rungs=(Budget(images=0), Budget(images=640)), promote=2, **changes)


def task(schedule: Schedule, rung: int = 0) -> Task:
    config = small()
    uid = uid_of(schedule, SHAPE)
    return Task(uid, config.model, config.data, schedule, config.rungs[rung], ("top1", "gmacs"), rung=rung)


def run(config: StudyConfig, workers: SimulatedWorkers, folder: Path) -> Done:
    return run_study(config, folder, storage="memory:", make_workers=lambda *_: workers)


def told(finished: list[SimulatedTask]) -> list[tuple[float, str, int, str]]:
    return [(one.ended, one.task.uid, one.task.rung, type(one.outcome).__name__) for one in finished]


def test_a_schedule_is_found_however_it_is_spelled(table: Table) -> None:
    assert table.images == BUDGETS and table.metrics == ("top1", "gmacs")
    spelled = Schedule((Stage(2, tokens=32), Stage(4, keep=1.0)))
    found = table.lookup(spelled, 1)
    assert found is not None and (found.metrics["top1"], found.seconds) == (90.0, 2.0)
    assert table.lookup(Schedule((Stage(3, keep=0.5),)), 1) is None


def test_a_schedule_that_lacks_a_rung_is_left_out(tmp_path: Path) -> None:
    rows = [row(DENSE, rung, 97.0, 1.0) for rung in range(3)] + [row(HALF, 0, 80.0, 1.0)]
    table = read_table(write(tmp_path / "table.csv", rows), SHAPE)
    assert list(table.schedules.values()) == [DENSE] and list(table.rows) == [uid_of(DENSE, SHAPE)]


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no column uid, images, seconds, schedule, but rung, top1.*record_table"):
        read_table(write(tmp_path / "front.csv", [{"rung": 0, "top1": 97.0}]), SHAPE)


def test_seconds_of_a_larger_budget_count_each_measurement_once() -> None:
    def seconds(images: int, before: int = 0) -> float:
        return seconds_of(lambda rung: Recorded({}, SECONDS[HALF][rung]), BUDGETS, images, before)

    assert [seconds(0), seconds(640), seconds(2560)] == [0.5, 2.0, 2.0 + 5.0 - 0.5]
    assert seconds(2560, before=640) == 5.0


def test_virtual_time_passes_as_the_table_says_for_any_number_of_workers(table: Table) -> None:
    workers = SimulatedWorkers(table, small(), count=2, overhead=0.25)
    workers.submit(task(DENSE))
    workers.submit(task(HALF))
    ((first, outcome),) = workers.wait(0.5)
    assert (first.schedule, workers.now) == (HALF, 0.75)
    assert isinstance(outcome, Evaluation) and (outcome.value("top1"), outcome.images) == (80.0, 0)
    assert outcome.tokens == estimate_cost(SHAPE, HALF).tokens
    workers.submit(task(HALF, rung=1))
    assert [workers.wait(0.5)[0][0].schedule for _ in range(2)] == [DENSE, HALF]
    assert workers.now == 0.75 + 2.25 and workers.wait(0.5) == []
    assert [(one.began, one.ended) for one in workers.finished] == [(0.0, 0.75), (0.0, 1.25), (0.75, 3.0)]


def test_a_whole_search_replays(table: Table, tmp_path: Path) -> None:
    workers = SimulatedWorkers(table, small())
    done = run(small(), workers, tmp_path)
    assert (done.reason, done.complete + done.paused, done.failed) == ("trials", 3, 0)
    at_first = [one for one in workers.finished if one.task.rung == 0]
    assert {one.task.schedule for one in at_first} == set(SECONDS)
    assert workers.now == sum(SECONDS[one.task.schedule][one.task.rung] for one in workers.finished)
    for one in workers.finished:
        assert isinstance(one.outcome, Evaluation)
        assert one.outcome.value("top1") == TOP1[one.task.schedule][one.task.rung]
    more = SimulatedWorkers(table, small(), count=3)
    run(small(), more, tmp_path / "more")
    assert more.now < workers.now


def test_time_ends(table: Table, tmp_path: Path) -> None:
    workers = SimulatedWorkers(table, small(), seconds=1.6)
    assert run(small(), workers, tmp_path).reason == "cancelled"
    assert workers.now == 1.6 and [one.ended for one in workers.finished] == [1.0]


def test_rungs_that_the_table_lacks_are_refused(table: Table) -> None:
    with pytest.raises(StudyError, match=r"rungs\[1\]: not in the table.*0, 640, 2560 images"):
        SimulatedWorkers(table, replace(small(), rungs=(Budget(images=0), Budget(images=100))))
    workers = SimulatedWorkers(table, small())
    with pytest.raises(StudyError, match="does not have it"):
        workers.submit(task(Schedule((Stage(5, keep=0.5),))))


def with_failures(table: Table, folder: Path, failures: Failures, **changes: Any) -> tuple[Done, list[SimulatedTask]]:
    config = study(40, "random", workers=WorkersConfig(kind="serial", retries=2, **changes))
    measured = partial(made_up, table)
    workers = SimulatedWorkers(table, config, measured=measured, count=4, failures=failures)
    return run(config, workers, folder), workers.finished


def made_up(table: Table, schedule: Schedule, rung: int) -> Recorded:
    cost = estimate_cost(table.shape, schedule).gmacs
    return Recorded({"top1": 90.0 + cost, "gmacs": cost}, 1000 * cost)


def test_failures_come_as_likely_as_asked_for_and_the_same_each_time(table: Table, tmp_path: Path) -> None:
    failures = Failures(crash=0.3, timeout=0.1, error=0.1)
    done, finished = with_failures(table, tmp_path / "one", failures, timeout=7.0)
    causes = [one.outcome.cause for one in finished]
    assert {"crash", "timeout", "error", None} == set(causes)
    assert 0.1 < causes.count("crash") / len(causes) < 0.5 and done.complete + done.failed == 40
    lost = [one for one in finished if isinstance(one.outcome, Lost) and one.outcome.cause == "timeout"]
    assert all(one.ended - one.began == pytest.approx(7.0) for one in lost)
    crashed = next(one.task for one in finished if one.outcome.cause == "crash")
    assert [one.task.attempt for one in finished if one.task.uid == crashed.uid][:2] == [0, 1]
    assert told(with_failures(table, tmp_path / "two", failures, timeout=7.0)[1]) == told(finished)


def test_nothing_but_crashes_ends_a_search(table: Table, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="crash"):
        with_failures(table, tmp_path, Failures(crash=1.0))


# --- filling in --------------------------------------------------------------------------------------------------


def drawn(generator: random.Random) -> Schedule:
    verb = generator.choice(("drop", "squeeze"))
    blocks = generator.sample(range(1, 7), 3)
    return Schedule(tuple(Stage(block, keep=generator.choice((0.6, 0.7, 0.8)), reduce=verb) for block in blocks))


def true_top1(schedule: Schedule, rung: int) -> float:
    hurt = 1.0 if any(stage.reduce == "drop" for stage in schedule.stages) else 0.6
    damage = sum(hurt * (1 - (stage.keep or 1.0)) / (1 + stage.block) for stage in schedule.stages)
    return 98 - (40 - 10 * rung) * damage


@pytest.fixture(scope="module")
def surrogate(tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    """A surrogate from 120 schedules. Accuracy is a formula plus training noise, which the first rung lacks."""
    generator = random.Random(0)
    schedules = list({uid_of(one, SHAPE): one for one in (drawn(generator) for _ in range(120))}.values())
    rows = [
        row(one, rung, true_top1(one, rung) + generator.gauss(0, 0.2 * rung), estimate_cost(SHAPE, one).gmacs)
        for one in schedules
        for rung in range(3)
    ]
    return Surrogate(read_table(write(tmp_path_factory.mktemp("table") / "table.csv", rows), SHAPE))


def test_what_was_not_measured_is_predicted(surrogate: Surrogate) -> None:
    generator = random.Random(1)
    new = [one for one in (drawn(generator) for _ in range(60)) if surrogate.table.lookup(one, 0) is None]
    for rung in range(3):
        errors = [surrogate.expected(one, rung).metrics["top1"] - true_top1(one, rung) for one in new]
        assert np.abs(errors).mean() < 0.25
    one = surrogate.expected(new[0], 2)
    assert one.metrics["gmacs"] == estimate_cost(SHAPE, new[0]).gmacs
    assert one.seconds == pytest.approx(one.metrics["gmacs"], rel=0.1)


def test_invented_evaluations_scatter_like_measured_ones(surrogate: Surrogate) -> None:
    generator = random.Random(2)
    new = [one for one in (drawn(generator) for _ in range(200)) if surrogate.table.lookup(one, 0) is None]
    scatter = [
        np.std([surrogate.measured(one, rung).metrics["top1"] - true_top1(one, rung) for one in new])
        for rung in range(3)
    ]
    assert scatter[0] < 0.2 and scatter[1] < scatter[2] and 0.3 < scatter[2] < 0.6
    assert surrogate.measured(new[0], 2) == surrogate.measured(new[0], 2)
    known = next(iter(surrogate.table.schedules.values()))
    assert surrogate.measured(known, 2) == surrogate.table.lookup(known, 2)


def test_its_errors_are_stated(surrogate: Surrogate) -> None:
    errors = {(one.name, one.images): one for one in surrogate.errors()}
    assert set(errors) == {(name, images) for name in ("top1", "seconds") for images in BUDGETS}
    first, last = errors["top1", 0], errors["top1", 2560]
    assert first.r2 > 0.98 and first.tau > 0.9 and first.mae < last.mae < 0.6
    assert last.r2 < first.r2 and last.tau_best < last.tau < first.tau


def test_verbs_that_the_table_lacks_are_refused(surrogate: Surrogate) -> None:
    with pytest.raises(ScheduleError, match=r"the table.*has no reduce merge"):
        surrogate.expected(Schedule((Stage(2, keep=0.5, reduce="merge"),)), 0)
