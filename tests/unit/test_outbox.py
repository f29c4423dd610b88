"""The outbox: results are adopted once, never fail the search, and are never taken from another study."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dying import Killed, die_at
from fake_search import evaluate, finished, records, run, study

from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.schedule import Schedule
from prunesearch.search import driver
from prunesearch.search.events import Event, Started
from prunesearch.workers.outbox import delivered, discard, evaluate_into
from prunesearch.workers.protocol import Workers


def leave_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of three candidates with a fourth result in the outbox."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "result", 4)
        run(study(6), tmp_path)
    (path,) = (tmp_path / "outbox").glob("*.json")
    return path


def recovered(events: list[Event]) -> int:
    assert isinstance(events[0], Started)
    return events[0].recovered


def test_a_full_disk_does_not_cost_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prunesearch.workers.outbox.write_atomically", full)
    config = study()
    task = Task("abc", config.model, config.data, Schedule(), config.rungs[0], ("top1",))
    assert evaluate_into(tmp_path, evaluate, task).uid == "abc"
    assert "abc is not written" in caplog.text


def test_it_holds_task_and_evaluation(tmp_path: Path) -> None:
    config = study()
    task = Task("abc", config.model, config.data, Schedule(), config.rungs[0], ("top1",), attempt=2)
    evaluation = evaluate_into(tmp_path, evaluate, task)
    assert [path.name for path in tmp_path.iterdir()] == ["abc.0.2.json"]
    assert delivered(tmp_path) == [(tmp_path / "abc.0.2.json", task, evaluation)]
    evaluate_into(tmp_path, evaluate, replace(task, attempt=3))
    discard(tmp_path, "abc", 0)
    assert not list(tmp_path.iterdir())


def test_a_result_is_adopted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_one(tmp_path, monkeypatch)
    again = path.read_bytes()
    assert recovered(run(study(4), tmp_path)[1]) == 1
    adopted = records(tmp_path)[3]
    assert adopted.state == "complete"
    path.write_bytes(again)  # a worker finishes after its driver has died
    assert recovered(run(study(4), tmp_path)[1]) == 0
    assert records(tmp_path)[3] == adopted and len(records(tmp_path)) == 4
    assert not list((tmp_path / "outbox").iterdir())


def test_a_result_without_a_record_becomes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_one(tmp_path, monkeypatch)
    content = path.read_bytes()
    expected = records(tmp_path)[3]
    run(study(3), tmp_path / "other")
    path = tmp_path / "other" / "outbox" / path.name
    path.write_bytes(content)
    assert recovered(run(study(4), tmp_path / "other")[1]) == 1
    found = records(tmp_path / "other")[3]
    assert (found.number, found.uid, found.seed, found.state) == (3, expected.uid, expected.seed, "complete")


def test_a_worker_that_outlives_its_driver_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_one(tmp_path, monkeypatch)
    content = path.read_bytes()
    path.unlink()
    start_workers = driver._start_workers

    def deliver_meanwhile(*arguments: Any) -> Workers:
        path.write_bytes(content)
        return start_workers(*arguments)

    monkeypatch.setattr(driver, "_start_workers", deliver_meanwhile)
    _, events = run(study(4), tmp_path)
    assert recovered(events) == 1 and len(finished(events)) == 0
    assert records(tmp_path)[3].state == "complete"


def test_a_damaged_file_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave_one(tmp_path, monkeypatch)
    for number, content in enumerate([path.read_bytes()[:-40], b"", b"[]", b'{"task": {}}', b"\xff\xfe"]):
        (path.parent / f"damaged{number}.0.0.json").write_bytes(content)
    (path.parent / ".half-written.json").write_bytes(b"{")
    with caplog.at_level(logging.WARNING):
        done, events = run(study(6), tmp_path)
    assert recovered(events) == 1 and done.complete == 6
    assert caplog.text.count("is damaged") == 5
    assert len(list(path.parent.glob("damaged*.aside"))) == 5


def test_results_of_other_settings_are_not_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = leave_one(tmp_path, monkeypatch)
    (tmp_path / "study.log").unlink()  # a new study in the same folder
    config = study(6)
    other = replace(config, measure=replace(config.measure, batch_size=7))
    with caplog.at_level(logging.WARNING):
        done, events = run(other, tmp_path)
    assert recovered(events) == 0 and done.complete == 6
    assert "other settings" in caplog.text and path.with_suffix(".aside").exists()


def test_the_evaluation_in_the_file_is_the_one_returned(tmp_path: Path) -> None:
    def fail(task: Task) -> Evaluation:
        return Evaluation(task.uid, "failed", cause="oom", error="é\n\u2028", traceback="x" * 10_000)

    config = study()
    task = Task("abc", config.model, config.data, Schedule(), config.rungs[0], ("top1",))
    assert delivered(tmp_path) == []
    evaluation = evaluate_into(tmp_path, fail, task)
    assert delivered(tmp_path)[0][2] == evaluation
