"""Several drivers: a claim succeeds for one only, and dead drivers are detected."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_search import small_study
from sqlalchemy.exc import OperationalError, ProgrammingError

from prunesearch.errors import RunError, StudyError
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record
from prunesearch.schedule import Schedule, Stage
from prunesearch.study import team
from prunesearch.study.lock import Place, is_held, one_of_several, only_driver
from prunesearch.study.reader import Beat
from prunesearch.study.storage import Patience
from prunesearch.study.store import Store, open_store
from prunesearch.study.team import Team

RECORD = Record(-1, "abc", Schedule((Stage(2, keep=0.7),)), "running", "sampler", 42)


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    one, two = (open_store(small_study(9), url, owner=name, alone=False) for name in ("one", "two"))
    yield one, two
    one.close()
    two.close()


def finished(rung: int = 0) -> Evaluation:
    return Evaluation("abc", "complete", rung, metrics=(("top1", 90.0), ("gmacs", 0.01)))


def test_the_first_one_has_a_candidate(stores: tuple[Store, Store]) -> None:
    one, two = stores
    begun = one.begin(RECORD, {})
    assert begun is not None and (begun.number, begun.owner) == (0, "one")
    assert two.begin(RECORD, {}) is None
    assert two.begin(replace(RECORD, uid="def"), {}) is not None
    assert [(record.number, record.uid, record.owner) for record in one.records()] == [
        (0, "abc", "one"),
        (1, "def", "two"),
    ]


def test_there_are_never_more_than_wanted(stores: tuple[Store, Store]) -> None:
    one, two = stores
    one.begin(RECORD, {}, total=2)
    assert two.begin(RECORD, {}, total=2) is None
    assert two.begin(replace(RECORD, uid="def"), {}, total=2) is not None
    assert one.begin(replace(RECORD, uid="ghi"), {}, total=2) is None  # one too many
    assert one.begin(replace(RECORD, uid="ghi"), {}, total=3) is not None


def test_only_one_promotes_and_only_once(stores: tuple[Store, Store]) -> None:
    one, two = stores
    begun = one.begin(RECORD, {})
    assert begun is not None
    paused = one.finish(begun, finished())
    assert [record.state for record in two.poll()] == ["paused"]
    higher = replace(paused, state="running", rung=1)
    assert one.promote(higher) and not two.promote(higher)
    paused = one.finish(higher, finished(1))
    assert not two.promote(higher), "it has this rung already"
    assert [(record.state, record.rung) for record in two.records()] == [("paused", 1)]
    assert two.promote(replace(paused, state="running", rung=2))
    two.finish(replace(paused, state="running", rung=2), finished(2))
    assert not one.promote(replace(paused, state="running", rung=2)), "it is complete"
    assert [record.state for record in one.poll()] == ["complete"]


def test_only_one_takes_over(stores: tuple[Store, Store], tmp_path: Path) -> None:
    one, two = stores
    begun = one.begin(RECORD, {})
    assert begun is not None
    three = open_store(small_study(9), f"sqlite:///{tmp_path / 'study.db'}", owner="three", alone=False)
    left = two.running()
    assert left == [] and two.poll() == three.records()
    [left_by_one] = two.running()
    assert two.take_over(left_by_one) and not three.take_over(left_by_one)
    assert [record.owner for record in three.poll()] == ["two"]
    assert one.finish(begun, finished()) is None and one.begin_again(begun.number) is None
    assert two.begin_again(begun.number) == 1
    three.close()


def test_starts_are_found_once(stores: tuple[Store, Store]) -> None:
    one, two = stores
    schedule = Schedule((Stage(3, keep=0.5),))
    assert one.starts(lambda: [("start: mine.yaml", schedule)]) == [("start: mine.yaml", schedule)]
    assert two.starts(lambda: pytest.fail("they are known")) == [("start: mine.yaml", schedule)]


def test_silence_elsewhere_is_death_after_a_lease(stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = stores
    now = 100.0
    monkeypatch.setattr(team, "LEASE_SECONDS", 60.0)
    here = Team(one, Place("one", Path("/nowhere/drivers/0")))
    monkeypatch.setattr(team.time, "monotonic", lambda: now)
    two.beat(Beat(7, "another machine", "/nowhere/drivers/1"))
    assert here.dead({"two", "never seen"}) == set()
    now += 50
    two.beat(Beat(8, "another machine", "/nowhere/drivers/1"))
    assert here.dead({"two", "never seen"}) == set()
    now += 50
    assert here.dead({"two", "never seen"}) == {"never seen"}
    now += 50
    assert here.dead({"two"}) == {"two"}
    two.beat(Beat(9, "another machine", "/nowhere/drivers/1"))
    assert here.dead({"two"}) == set()
    two.beat(Beat(None, "another machine", "/nowhere/drivers/1"))
    assert here.dead({"two"}) == {"two"}, "it said goodbye"
    monkeypatch.undo()
    here.close()
    assert one.beats()["one"].count is None


def test_on_the_same_machine_the_lock_tells(
    stores: tuple[Store, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = stores
    held = {"two": True}
    monkeypatch.setattr(team, "is_held", lambda path, name: held[name])
    here = Team(one, Place("one", tmp_path / "drivers" / "0"), lease=0.0)
    two.beat(Beat(1, here._machine, str(tmp_path / "drivers" / "1")))
    time.sleep(0.01)
    assert here.dead({"two"}) == set(), "silent, but it holds its lock"
    held["two"] = False
    assert here.dead({"two"}) == {"two"}
    here.close()


def test_places_have_names_that_stay(tmp_path: Path) -> None:
    with one_of_several(tmp_path, None) as place:
        assert place.file == tmp_path / "drivers" / "0"
    assert is_held(place.file, "somebody else") is None and is_held(tmp_path / "gone", place.name) is None
    assert is_held(place.file, place.name) is False  # the lock is released
    with one_of_several(tmp_path, None) as again:
        assert again == place


def test_the_only_driver_and_several_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []

    def lock(file: Any, kind: int) -> None:
        refused.append(kind)
        raise OSError

    (tmp_path / "lock").write_text("host:1")
    monkeypatch.setattr(fcntl, "lockf", lock)
    with pytest.raises(StudyError, match=r"host:1.*--storage URL"), only_driver(tmp_path):
        pass
    with pytest.raises(StudyError, match="host:1"), one_of_several(tmp_path / "mine", tmp_path / "study.db"):
        pass
    assert refused == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB]


def away() -> optuna.exceptions.StorageInternalError:
    error = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = OperationalError("INSERT", {}, Exception("database or disk is full"))
    return error


def test_a_storage_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [away(), away(), "done"]
    waits: list[str] = []
    monkeypatch.setattr("prunesearch.study.storage.PAUSE_SECONDS", 0.0)

    def operation() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    assert Patience(on_wait=lambda why, waited: waits.append(why) is None)(operation) == "done"
    assert len(waits) == 2 and "disk is full" in waits[0]


@pytest.mark.parametrize("case", ["told to stop", "too long", "does not pass"])
def test_waiting_ends(case: str) -> None:
    def operation() -> None:
        raise ProgrammingError("SELECT", {}, Exception("syntax")) if case == "does not pass" else away()

    patience = Patience(0.0 if case == "too long" else 60.0, on_wait=lambda why, waited: case != "told to stop")
    with pytest.raises(RunError, match=r"finished evaluations are in the outbox\. Mend the storage and run"):
        patience(operation)
