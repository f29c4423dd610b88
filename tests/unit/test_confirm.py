"""Confirmation of the final front with fresh seeds: what is evaluated, what is not repeated, what is reported."""

from __future__ import annotations

import csv
import io
import random
from dataclasses import replace
from pathlib import Path

import fake_search
import pytest
from fake_records import study_records
from fake_search import SPACE, records, run, small_study, study
from rich.console import Console

from prunesearch.config import ConfirmConfig, DataConfig, Objective, StudyConfig
from prunesearch.confirmation import confirmation_of, confirmation_row, mean_drop, measured_objectives
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.export.schedules import export
from prunesearch.files import load_schedule_file
from prunesearch.front import front, front_rows
from prunesearch.record import Record
from prunesearch.report import front_csv, front_table
from prunesearch.report.plot import plot_front
from prunesearch.search.confirm import Confirmed, confirm, missing
from prunesearch.search.driver import run_study
from prunesearch.search.events import Done, Event
from prunesearch.search.once import Crew
from prunesearch.study.store import open_store
from prunesearch.study.team import NoTeam
from prunesearch.workers.protocol import Lost, Outcome
from prunesearch.workers.serial import SerialWorkers

OBJECTIVES = (Objective("top1", "maximize"), Objective("gmacs", "minimize"))
TASKS: list[Task] = []


class Killed(BaseException):
    """Simulates SIGKILL."""


@pytest.fixture(autouse=True)
def nothing_evaluated_yet() -> None:
    TASKS.clear()


def evaluate(task: Task) -> Evaluation:
    """As in `fake_search`, but with noise by seed, and lower accuracy on test images."""
    TASKS.append(task)
    found = fake_search.evaluate(replace(task, uid=task.uid.split(".")[0], rung=0))
    luck = random.Random(task.seed).gauss(0, 2) - 5 * (task.split == "test")
    values = {**dict(found.metrics), "top1": found.value("top1") + luck}
    return replace(found, uid=task.uid, rung=task.rung, metrics=tuple(values.items()))


def searched(folder: Path, config: StudyConfig | None = None) -> StudyConfig:
    config = config or study(16)
    run(config, folder)
    return replace(config, confirm=ConfirmConfig(seeds=2))


def again(config: StudyConfig, folder: Path, workers: SerialWorkers | None = None) -> list[Confirmed]:
    events: list[Confirmed] = []
    store = open_store(config, f"journal:{folder / 'study.log'}")
    workers = workers or SerialWorkers(config.workers, folder / "outbox", "test_confirm:evaluate")
    try:
        confirm(config, Crew(folder, folder / "outbox", store, workers, NoTeam()), events.append)
    finally:
        store.close()
    return events


def test_the_front_and_the_dense_model_with_fresh_seeds_from_scratch(tmp_path: Path) -> None:
    config = searched(tmp_path, small_study(8, "random"))
    events = again(config, tmp_path)
    found = records(tmp_path)
    best = front(found, config.objectives)
    dense = found[0]
    assert {one.record.uid for one in events} == {dense.uid} | {record.uid for record in best}
    assert len(TASKS) == 2 * len({one.record.uid for one in events}) == events[-1].total == events[-1].done
    assert TASKS[0].schedule == dense.schedule  # first
    for task in TASKS:
        assert (task.rung, task.budget, task.resume_from, task.save_to) == (2, config.rungs[2], None, None)
    assert len({task.seed for task in TASKS} | {record.seed for record in found}) == len(TASKS) + len(found)
    for record in best:
        assert len(record.confirmations) == 2 and confirmation_of(record) is not None
    assert all(not record.confirmations for record in found if record not in best and record is not dense)
    assert again(config, tmp_path) == []  # nothing is left to do
    assert len(again(replace(config, confirm=ConfirmConfig(seeds=3)), tmp_path)) == len(events) // 2
    assert missing(replace(config, confirm=ConfirmConfig()), tmp_path, found) == []


def test_a_kill_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = searched(tmp_path)
    store_type = type(open_store(config, f"journal:{tmp_path / 'study.log'}"))
    write, times = store_type.confirm, iter(range(3))

    def die(self: object, uid: str, index: int, evaluation: Evaluation) -> None:
        if next(times, None) is None:
            raise Killed  # after the worker wrote to the outbox
        write(self, uid, index, evaluation)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store_type, "confirm", die)
        again(config, tmp_path)
    assert len(TASKS) == 4
    events = again(config, tmp_path)
    uids = [task.uid for task in TASKS]
    assert len(uids) == len(set(uids)) == events[-1].total
    assert not list((tmp_path / "outbox").glob("*.json"))


def test_what_fails_is_tried_again_next_time(tmp_path: Path) -> None:
    class Unlucky(SerialWorkers):
        deaths = 0

        def wait(self, seconds: float) -> list[Outcome]:
            task = self._tasks.popleft()
            self.deaths += 1
            if self.deaths <= 2:  # one more than the retries
                return [(task, Lost("crash", "killed"))]
            if self.deaths == 3:
                return [(task, Lost("timeout", "too slow"))]
            self.submit(task)
            return super().wait(seconds)

    config = searched(tmp_path)
    events = again(config, tmp_path, Unlucky(config.workers, tmp_path / "outbox", "test_confirm:evaluate"))
    assert [one.evaluation.cause for one in events[:3]] == ["crash", "timeout", None]
    assert events[-1].done == events[-1].total
    assert len(again(config, tmp_path)) == 2
    assert missing(config, tmp_path, records(tmp_path)) == []


def test_a_search_ends_with_it_and_continues_with_what_is_missing(tmp_path: Path) -> None:
    config, url = replace(study(12), confirm=ConfirmConfig(1, speed_seconds=0)), f"journal:{tmp_path / 'study.log'}"

    def search(config: StudyConfig, **how: bool) -> list[Event]:
        events: list[Event] = []
        run_study(config, tmp_path, storage=url, on_event=events.append, evaluate="test_confirm:evaluate", **how)
        return events

    events = search(config)
    assert isinstance(events[-1], Done) and isinstance(events[-2], Confirmed)
    first = len(TASKS)
    assert first == 12 + sum(isinstance(event, Confirmed) for event in events)
    assert not any(isinstance(event, Confirmed) for event in search(config)) and len(TASKS) == first
    more = replace(config, confirm=ConfirmConfig(2, speed_seconds=0), stop=replace(config.stop, trials=20))
    events = search(more, search=False)
    assert len(records(tmp_path)) == 12 and isinstance(events[-1], Done)
    assert len(TASKS) - first == sum(isinstance(event, Confirmed) for event in events) == first - 12


def test_on_request_nothing_new_is_begun(tmp_path: Path) -> None:
    config = searched(tmp_path)
    store = open_store(config, f"journal:{tmp_path / 'study.log'}")
    workers = SerialWorkers(config.workers, tmp_path / "outbox", "test_confirm:evaluate")
    confirm(config, Crew(tmp_path, tmp_path / "outbox", store, workers, NoTeam(), lambda: len(TASKS) >= 3))
    store.close()
    assert len(TASKS) == 3


def test_test_images_take_the_place_of_those_for_validation(tmp_path: Path) -> None:
    config = searched(tmp_path)
    again(config, tmp_path)
    assert {task.split for task in TASKS} == {"validation"}
    before = {record.uid: confirmation_of(record) for record in records(tmp_path)}
    tested = replace(config, data=DataConfig(test_root="/elsewhere"))  # test images are given later
    again(tested, tmp_path)
    assert {task.split for task in TASKS[len(TASKS) // 2 :]} == {"test"}
    for record in records(tmp_path):
        then, now = before[record.uid], confirmation_of(record)
        assert (then is None) == (now is None)
        if then is not None and now is not None:
            assert (then.split, now.split, now.seeds) == ("validation", "test", 2)


def measured_again(record: Record, *values: float) -> Record:
    assert record.evaluation is not None
    found = tuple(
        replace(record.evaluation, uid=f"{record.uid}.validation{index}", metrics=(("top1", value), ("gmacs", 0.01)))
        for index, value in enumerate(values)
    )
    return replace(record, confirmations=found)


def test_means_spreads_and_the_drop(tmp_path: Path) -> None:
    config = searched(tmp_path)
    one, other, third = (replace(record, confirmations=()) for record in records(tmp_path)[:3])
    first, second = (record.evaluation.value("top1") for record in (one, other) if record.evaluation)
    one, other = measured_again(one, first - 3, first - 1), measured_again(other, second)
    found = confirmation_of(one)
    assert found is not None and (found.split, found.seeds) == ("validation", 2)
    assert found.mean["top1"] == pytest.approx(first - 2) and found.spread["top1"] == pytest.approx(2**0.5)
    assert confirmation_row(other)["spread"] == {} and confirmation_row(third) == {} and confirmation_of(third) is None
    quality = measured_objectives(config.objectives)
    assert [objective.metric for objective in quality] == ["top1"]
    assert mean_drop([one, other, third], quality[0]) == pytest.approx(1.0)
    assert mean_drop([one, other, third], replace(quality[0], goal="minimize")) == pytest.approx(-1.0)
    assert mean_drop([third], quality[0]) is None


def confirmed_study(seeds: int = 2, split: str = "test") -> list[Record]:
    """Made-up records with confirmations: each seed is one point worse than the one before."""
    found = study_records()
    best = {record.number for record in front(found, OBJECTIVES)}

    def once_more(record: Record) -> Record:
        evaluations = []
        for index in range(seeds):
            values = {**dict(record.evaluations[0].metrics), "top1": record.evaluations[0].value("top1") - 1 - index}
            uid = f"{record.uid}.{split}{index}"
            evaluations.append(replace(record.evaluations[0], uid=uid, metrics=tuple(values.items())))
        return replace(record, confirmations=tuple(evaluations))

    return [once_more(record) if record.number in best | {0} else record for record in found]


def test_the_table_shows_both_numbers_and_how_much_the_search_flattered() -> None:
    found = confirmed_study()
    console = Console(width=140, file=io.StringIO(), highlight=False)
    console.print(front_table(front(found, OBJECTIVES), OBJECTIVES, found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "96.82", "-0.68", "95.32", "±", "0.71", "0.00847", "66%", "evit-0.7"] in [row[:9] for row in rows]
    assert ["0", "97.50", "96.00", "±", "0.71", "0.01283", "dense", "for", "comparison"] in rows
    told = " ".join(text.split())
    assert "2 seeds, test images; top1 is on average 1.50 points worse than in the search" in told
    assert "the dense model: 1.50 points worse" in told
    once = confirmed_study(1, "validation")
    console.print(front_table(front(once, OBJECTIVES), OBJECTIVES, once))
    assert "1 seed, the same images" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_rows_for_other_programs_have_both(tmp_path: Path) -> None:
    found = confirmed_study()
    best = front(found, OBJECTIVES)
    for row, line in zip(
        front_rows(best, OBJECTIVES), csv.DictReader(io.StringIO(front_csv(best, OBJECTIVES))), strict=True
    ):
        assert row["again"]["metrics"]["top1"] == pytest.approx(row["metrics"]["top1"] - 1.5, abs=1e-5)
        assert (row["again"]["split"], row["again"]["seeds"]) == ("test", 2)
        assert float(line["top1_again"]) == row["again"]["metrics"]["top1"]
        assert float(line["top1_again_spread"]) == pytest.approx(0.5**0.5, abs=1e-5)
        assert (line["again_split"], line["again_seeds"]) == ("test", "2")
    assert not any("again" in row for row in front_rows(study_records(), OBJECTIVES))
    assert "again" not in front_csv(study_records()[:3], OBJECTIVES)


@pytest.mark.parametrize("objectives", [OBJECTIVES, OBJECTIVES[:1]])
def test_the_picture_has_both(tmp_path: Path, objectives: tuple[Objective, ...]) -> None:
    plot_front(confirmed_study(), objectives, tmp_path / "both.svg")
    plot_front(study_records(), objectives, tmp_path / "one.svg")
    assert "measured again" in (tmp_path / "both.svg").read_text()
    assert "measured again" not in (tmp_path / "one.svg").read_text()


def test_an_exported_schedule_tells_both(tmp_path: Path) -> None:
    record = confirmed_study()[1]
    export(record, study(), tmp_path / "best.yaml")
    measured = load_schedule_file(tmp_path / "best.yaml").measured
    assert measured["again"]["metrics"]["top1"] == pytest.approx(measured["top1"] - 1.5, abs=1e-5)


def test_there_is_nothing_to_confirm_but_the_dense_model(tmp_path: Path) -> None:
    config = searched(tmp_path, study(1, space=SPACE))
    assert again(config, tmp_path) == [] and not TASKS
