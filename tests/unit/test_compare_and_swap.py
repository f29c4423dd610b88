"""A late driver changes nothing: each write first checks that the driver still owns the candidate."""

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

from prunesearch.errors import StudyError
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record
from prunesearch.schedule import Schedule, Stage
from prunesearch.study.lock import only_driver
from prunesearch.study.store import Store, open_store

RECORD = Record(-1, "abc", Schedule((Stage(2, keep=0.7),)), "running", "sampler", 42)
FAILURE = Evaluation("abc", "failed", cause="nan", error="the loss")


def result(rung: int, top1: float = 90.0) -> Evaluation:
    return Evaluation("abc", "complete", rung, metrics=(("top1", top1), ("gmacs", 0.01)))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('database') / 'study.db'}"


@pytest.fixture(scope="module")
def stores(url: str) -> Iterator[list[Store]]:
    """One study for all tests, because opening it takes longer than the tests."""
    found = [open_store(small_study(9), url, owner=name, alone=False) for name in ("late", "second", "third")]
    yield found
    for store in found:
        store.close()


@pytest.fixture
def drivers(stores: list[Store], record: Record) -> Iterator[list[Store]]:
    for store in stores:
        store.poll()
    yield stores


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """A new candidate for each test."""
    return replace(RECORD, uid=request.node.name)


def trial_of(store: Store, uid: str) -> FrozenTrial:
    """Everything in the database about a candidate, read without a cache."""
    trials = store._storage._backend.get_all_trials(store._study_id)  # type: ignore[attr-defined]
    (found,) = (trial for trial in trials if trial.user_attrs["uid"] == uid)
    return found


def taken_over(record: Record, late: Store, second: Store, third: Store) -> Record:
    """The late driver counted as dead; the second one has taken over its candidate."""
    begun = late.begin(record, {})
    seen = second.find(record.uid)
    assert begun is not None and seen is not None
    assert second.take_over(seen) and second.begin_again(seen.number) == 1
    return begun


def taken_over_and_finished(record: Record, late: Store, second: Store, third: Store) -> Record:
    begun = taken_over(record, late, second, third)
    assert second.finish(replace(begun, owner="second"), result(0)) is not None
    return begun


def taken_over_and_promoted(record: Record, late: Store, second: Store, third: Store) -> Record:
    begun = taken_over_and_finished(record, late, second, third)
    paused = third.find(record.uid)
    assert paused is not None and third.promote(replace(paused, state="running", rung=1))
    return begun


def taken_over_and_failed(record: Record, late: Store, second: Store, third: Store) -> Record:
    begun = taken_over(record, late, second, third)
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
    "begin": lambda store, record: store.begin(replace(record, number=-1), {}) is not None,
}
POSSIBLE = {("promote", "taken_over_and_finished")}
"""Every driver may promote a paused candidate."""


def late_write(record: Record, drivers: list[Store], situation: Callable[..., Record], write: str) -> None:
    """Create a situation and let the late driver write. Raises AssertionError when that changes anything."""
    begun = situation(record, *drivers)
    before = trial_of(drivers[0], record.uid)
    done = WRITES[write](drivers[0], begun)
    if (write, situation.__name__) in POSSIBLE:
        assert done
    else:
        assert not done and trial_of(drivers[0], record.uid) == before


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("write", WRITES)
def test_a_late_driver_changes_nothing(
    record: Record, drivers: list[Store], situation: Callable[..., Record], write: str
) -> None:
    late_write(record, drivers, situation, write)


def test_what_is_told_twice_happens_once(record: Record, drivers: list[Store]) -> None:
    """Repeats a write, as when the answer of the database was lost."""
    one, two, _ = drivers
    begun = one.begin(record, {})
    assert begun is not None
    paused = one.finish(begun, result(0))
    before = trial_of(one, record.uid)
    again = one.finish(begun, result(0))
    assert paused is not None and again is not None and again.evaluations == paused.evaluations
    assert trial_of(one, record.uid) == before
    higher = replace(begun, rung=1)
    assert one.promote(higher)
    before = trial_of(one, record.uid)
    two.poll()
    assert one.promote(higher) and trial_of(one, record.uid) == before and not two.promote(higher)
    two.poll()
    assert two.take_over(replace(higher, owner="late"))
    before = trial_of(one, record.uid)
    assert two.take_over(replace(higher, owner="late")) and trial_of(one, record.uid) == before


def test_an_evaluation_that_began_anew_is_not_taken_over(record: Record, drivers: list[Store]) -> None:
    one, two, _ = drivers
    begun = one.begin(record, {})
    seen = two.find(record.uid)  # two takes one for dead, but one was started again
    assert begun is not None and seen is not None
    assert one.begin_again(begun.number) == 1
    assert not two.take_over(seen)
    seen = two.find(record.uid)
    assert seen is not None and two.take_over(seen)


def test_the_highest_rung_is_whole_for_optuna(record: Record, drivers: list[Store]) -> None:
    one, uid = drivers[0], record.uid
    begun = one.begin(record, {"gmacs": -0.5})
    for rung in range(3):
        assert begun is not None
        if rung:
            begun = replace(begun, state="running", rung=rung)
            assert one.promote(begun)
        begun = one.finish(begun, result(rung, 90.0 + rung))
    trial = trial_of(one, uid)
    assert trial.state.name == "COMPLETE" and trial.values == [92.0, 0.01]
    assert trial.constraints == {"gmacs": -0.5} and trial.datetime_complete >= trial.datetime_start
    assert trial.user_attrs["attempts"] == [1, 1, 1] and trial.params["block2.keep"] == 0.7


@pytest.mark.parametrize("write", ["begin", "take over", "promote"])
def test_of_several_at_once_one_wins(record: Record, drivers: list[Store], write: str) -> None:
    race(record, drivers, write)


def race(record: Record, drivers: list[Store], write: str) -> None:
    """Let all drivers do the same at the same time. Raises AssertionError unless exactly one succeeds."""
    uid, stores = record.uid, drivers
    if write != "begin":
        owner, *stores = drivers
        begun = owner.begin(record, {})
        assert begun is not None
        record = begun
        if write == "promote":
            owner.finish(record, result(0))
            record = replace(record, rung=1)
    for store in stores:
        store.poll()
    claims: dict[str, Callable[[Store], bool]] = {
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
    assert trial_of(drivers[0], uid).user_attrs["owner"] == won[0]


@pytest.mark.parametrize("calls", range(6))
def test_reading_hides_nothing_from_poll(record: Record, drivers: list[Store], calls: int) -> None:
    """`poll` returns every change once, even if other methods have read it before."""
    writer, reader, _ = drivers
    polled: list[tuple[str, str]] = []
    uids = [f"{record.uid} {step}" for step in range(3)]
    for step, uid in enumerate(uids):
        begun = writer.begin(replace(record, uid=uid), {})
        assert begun is not None
        for change in ("running", "paused"):
            if change == "paused":
                assert writer.finish(begun, replace(result(0), uid=uid)) is not None
            for _ in range(calls >> step & 1 or calls % 3):
                assert uid in {one.uid for one in reader.records()}
                assert reader.find(uid) is not None and reader.running() is not None
            polled += [(one.uid, one.state) for one in reader.poll()]
    assert polled == [(uid, change) for uid in uids for change in ("running", "paused")]
    assert reader.poll() == []


def test_a_journal_has_one_driver_wherever_it_was_started(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    journal = tmp_path / "journals" / "study.log"
    with only_driver(tmp_path / "one", journal):
        pass
    [lock] = journal.parent.iterdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    other = subprocess.Popen(  # file locks belong to processes
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
