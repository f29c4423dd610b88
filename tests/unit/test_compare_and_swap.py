"""Whoever comes late changes nothing: each write of a driver looks first whether the candidate is still its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_search import small_study
from optuna.trial import FrozenTrial

from prunesearch.config import StudyConfig
from prunesearch.errors import StudyError
from prunesearch.evaluate.task import Evaluation
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.lock import only_driver
from prunesearch.search.record import Record
from prunesearch.search.study import Store, open_store

RECORD = Record(-1, "abc", Schedule((Stage(2, keep=0.7),)), "running", "sampler", 42)


def result(rung: int, top1: float = 90.0) -> Evaluation:
    return Evaluation("abc", "complete", rung, metrics=(("top1", top1), ("gmacs", 0.01)))


FAILURE = Evaluation("abc", "failed", cause="nan", error="the loss")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def drivers(url: str) -> Iterator[list[Store]]:
    stores = [open_store(small_study(9), url, owner=name, alone=False) for name in ("late", "second", "third")]
    yield stores
    for store in stores:
        store.close()


def trials(store: Store) -> list[FrozenTrial]:
    """All that the database knows of candidates, without a cache between."""
    return list(store._storage._backend.get_all_trials(store._study_id))  # type: ignore[attr-defined]


def taken_over(late: Store, second: Store, third: Store) -> Record:
    """The late one was silent for too long; the second one runs its candidate now."""
    begun = late.begin(RECORD, {})
    assert begun is not None
    [seen] = second.poll()
    assert second.take_over(seen) and second.begin_again(seen.number) == 1
    return begun


def taken_over_and_finished(late: Store, second: Store, third: Store) -> Record:
    begun = taken_over(late, second, third)
    assert second.finish(replace(begun, owner="second"), result(0)) is not None
    return begun


def taken_over_and_promoted(late: Store, second: Store, third: Store) -> Record:
    begun = taken_over_and_finished(late, second, third)
    [paused] = third.poll()
    assert third.promote(replace(paused, state="running", rung=1))
    return begun


def taken_over_and_failed(late: Store, second: Store, third: Store) -> Record:
    begun = taken_over(late, second, third)
    assert second.finish(replace(begun, owner="second"), FAILURE) is not None
    return begun


SITUATIONS = (taken_over, taken_over_and_finished, taken_over_and_promoted, taken_over_and_failed)
WRITES: dict[str, Callable[[Store, Record], object]] = {
    "finish": lambda store, record: store.finish(record, result(0, 80.0)) is not None,
    "finish, failed": lambda store, record: store.finish(record, replace(FAILURE, error="another")) is not None,
    "begin again": lambda store, record: store.begin_again(record.number) is not None,
    "take over": lambda store, record: store.take_over(replace(record, owner="somebody")),
    "take over as last seen": lambda store, record: store.take_over(replace(record, owner="second")),
    "promote": lambda store, record: store.promote(replace(record, rung=1)),
    "begin": lambda store, record: store.begin(RECORD, {}) is not None,
}
POSSIBLE = {("promote", "taken_over_and_finished")}
"""Anyone may promote what waits."""


def late_write(drivers: list[Store], situation: Callable[..., Record], write: str) -> None:
    """Bring about a situation, and let the late driver write. Raises AssertionError when that changes anything."""
    begun = situation(*drivers)
    before = trials(drivers[0])
    done = WRITES[write](drivers[0], begun)
    if (write, situation.__name__) in POSSIBLE:
        assert done
    else:
        assert not done and trials(drivers[0]) == before


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("write", WRITES)
def test_a_late_driver_changes_nothing(drivers: list[Store], situation: Callable[..., Record], write: str) -> None:
    late_write(drivers, situation, write)


def test_what_is_told_twice_happens_once(drivers: list[Store]) -> None:
    """As when the database's answer was lost and the driver asks again."""
    one, two, _ = drivers
    begun = one.begin(RECORD, {})
    assert begun is not None
    paused = one.finish(begun, result(0))
    before = trials(one)
    assert paused is not None and one.finish(begun, result(0)) == replace(paused, orders=(1,)) and trials(one) == before
    higher = replace(begun, rung=1)
    assert one.promote(higher)
    before = trials(one)
    two.poll()
    assert one.promote(higher) and trials(one) == before and not two.promote(higher)
    two.poll()
    assert two.take_over(replace(higher, owner="late"))
    before = trials(one)
    assert two.take_over(replace(higher, owner="late")) and trials(one) == before


def test_an_evaluation_that_began_anew_is_not_taken_over(drivers: list[Store]) -> None:
    one, two, _ = drivers
    begun = one.begin(RECORD, {})
    assert begun is not None
    [seen] = two.poll()  # two believes that one is dead, but it was started again
    assert one.begin_again(begun.number) == 1
    assert not two.take_over(seen)
    [seen] = two.poll()
    assert two.take_over(seen)


def test_the_highest_rung_is_whole_for_optuna(drivers: list[Store]) -> None:
    one = drivers[0]
    record = one.begin(RECORD, {"gmacs": -0.5})
    for rung in range(3):
        assert record is not None
        if rung:
            record = replace(record, state="running", rung=rung)
            assert one.promote(record)
        record = one.finish(record, result(rung, 90.0 + rung))
    [trial] = trials(one)
    assert trial.state.name == "COMPLETE" and trial.values == [92.0, 0.01]
    assert trial.constraints == {"gmacs": -0.5} and trial.datetime_complete >= trial.datetime_start
    assert trial.user_attrs["attempts"] == [1, 1, 1] and trial.params["block2.keep"] == 0.7


@pytest.mark.parametrize("write", ["begin", "take over", "promote"])
def test_of_many_at_once_one_wins(url: str, write: str) -> None:
    race(url, small_study(9), write)


def race(url: str, config: StudyConfig, write: str) -> None:
    """Let four drivers do the same at the same moment. Raises AssertionError unless one of them succeeds."""
    owner, *stores = [open_store(config, url, owner=f"{n}", alone=False) for n in range(5)]
    record = RECORD
    if write != "begin":
        begun = owner.begin(RECORD, {})
        assert begun is not None
        record = begun
    if write == "promote":
        owner.finish(record, result(0))
        record = replace(record, rung=1)
    for store in stores:
        store.poll()
    claims = {
        "begin": lambda store: store.begin(record, {}) is not None,
        "take over": lambda store: store.take_over(record),
        "promote": lambda store: store.promote(record),
    }
    ready, won = threading.Barrier(len(stores)), []

    def claim(store: Store) -> None:
        ready.wait()
        if claims[write](store):
            won.append(store.owner)

    threads = [threading.Thread(target=claim, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    [record] = owner.records()
    assert record.owner == won[0]
    for store in (owner, *stores):
        store.close()


@pytest.mark.parametrize("calls", range(6))
def test_reading_hides_nothing_from_poll(drivers: list[Store], calls: int) -> None:
    """Every change is polled once, whatever is read between: records() before the poll after each bit of `calls`."""
    writer, reader, _ = drivers
    polled: list[tuple[str, str]] = []
    for step in range(3):
        record = writer.begin(replace(RECORD, uid=f"{step}"), {})
        assert record is not None
        for change in ("running", "paused"):
            if change == "paused":
                assert writer.finish(record, replace(result(0), uid=f"{step}")) is not None
            for _ in range(calls >> step & 1 or calls % 3):
                assert len(reader.records()) == step + 1
                assert reader.find(f"{step}") is not None and reader.running() is not None
            polled += [(one.uid, one.state) for one in reader.poll()]
    assert polled == [(f"{step}", change) for step in range(3) for change in ("running", "paused")]
    assert reader.poll() == []


def test_a_journal_has_one_driver_wherever_it_was_started(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    journal = tmp_path / "journals" / "study.log"
    with only_driver(tmp_path / "one", journal):
        pass
    [lock] = journal.parent.iterdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    other = subprocess.Popen(  # locks are by process
        [sys.executable, "-c", f"{hold}; sys.stdin.read()", str(lock)], stdin=-1, stdout=-1, text=True
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        (tmp_path / "link.log").symlink_to(journal)
        for path in (journal, tmp_path / "link.log"):
            with (
                pytest.raises(StudyError, match=r"study.log: another process .* runs"),
                only_driver(tmp_path / "two", path),
            ):
                pass
        with only_driver(tmp_path / "two", journal.with_name("other.log")):
            pass
        other.kill()
    with only_driver(tmp_path / "two", journal):
        pass
