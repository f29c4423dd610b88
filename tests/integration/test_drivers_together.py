"""Drivers with separate folders: no finished evaluation is repeated, even if drivers die or start late."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from driving import fake_search  # first, because it adds the unit tests to the path
from dying import STEPS, Killed, die_at

from prunesearch.config import ConfirmConfig, StudyConfig
from prunesearch.evaluate.task import Evaluation, Speed, Task
from prunesearch.files import write_atomically
from prunesearch.record import Record
from prunesearch.search.confirm import confirm, missing, take_up_confirmations
from prunesearch.search.driver import run_study
from prunesearch.search.events import Event, Started
from prunesearch.search.once import Crew
from prunesearch.search.speed import time_schedules, wanted
from prunesearch.study.lock import Place
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.store import Store, open_store
from prunesearch.study.team import BEATS_PER_LEASE, Team
from prunesearch.workers.outbox import evaluate_into
from prunesearch.workers.serial import SerialWorkers


def during(task: Task) -> None:
    """Called during each evaluation. Tests replace it."""


@pytest.fixture(autouse=True)
def nothing_evaluated_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_search.EVALUATED.clear()
    monkeypatch.setattr("prunesearch.search.loop.TICK_SECONDS", 0.02)
    monkeypatch.setattr("prunesearch.search.others.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("prunesearch.search.once.TICK_SECONDS", 0.02)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def evaluate(task: Task) -> Evaluation:
    during(task)
    found = fake_search.evaluate(replace(task, uid=task.uid.partition(".")[0]))
    fake_search.EVALUATED[-1] = f"{task.uid} {task.rung}"
    return replace(found, uid=task.uid)


def timer(task: Task) -> Evaluation:
    """Times that are made up; their `host` says which thread made them."""
    during(task)
    fake_search.EVALUATED.append(task.uid)
    assert task.timing is not None
    speeds = (Speed("", 1.0, 1.0, 1.0, 2.0, 2.0), *(Speed(one.name, 2.0, 1.9, 2.1) for one in task.timing.schedules))
    return Evaluation(task.uid, "complete", speeds=speeds, host=threading.current_thread().name)


def search(config: StudyConfig, folder: Path, url: str, lease: float = 0.2) -> list[Event]:
    events: list[Event] = []
    run_study(
        config, folder, storage=url, on_event=events.append, evaluate="test_drivers_together:evaluate", lease=lease
    )
    return events


def read(url: str) -> list[Record]:
    reader = open_study_readonly(storage=url)
    try:
        return reader.records()
    finally:
        reader.close()


def undelivered(place: Path) -> list[str]:
    return sorted(path.name for path in place.rglob("outbox/**/*") if path.is_file())


@pytest.mark.parametrize("step", STEPS)
def test_a_survivor_adopts_from_the_folder_of_the_dead(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    config = fake_search.small_study(6, "random")
    for time_ in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, step, time_)
            search(config, tmp_path / f"dead{time_}", url)
    search(config, tmp_path / "survivor", url)
    found = read(url)
    assert len(found) == 6 and {record.state for record in found} <= {"complete", "paused"}
    assert sorted(fake_search.EVALUATED) == sorted(
        f"{one.uid} {one.rung}" for record in found for one in record.evaluations
    )
    left = undelivered(tmp_path)
    for time_ in (2, 3):  # a driver that restarts finds all its results in the study
        search(config, tmp_path / f"dead{time_}", url)
    assert not undelivered(tmp_path), left


def test_without_a_shared_disk_only_what_was_not_yet_written_is_repeated(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "result", 3)
        search(fake_search.study(6), tmp_path / "dead", url)
    (tmp_path / "dead").rename(tmp_path / "away")
    search(fake_search.study(6), tmp_path / "survivor", url)
    assert (
        len(read(url)) == 6
        and Counter(fake_search.EVALUATED).most_common(2)[0][1] == 2
        and len(fake_search.EVALUATED) == 7
    )
    again = len(fake_search.EVALUATED)
    (tmp_path / "away").rename(tmp_path / "dead")
    events = search(fake_search.study(6), tmp_path / "dead", url)
    assert isinstance(events[1], Started) and events[1].recovered == 0
    assert len(fake_search.EVALUATED) == again and not undelivered(tmp_path)


def test_what_a_driver_that_was_alone_left_is_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "result", 3)
        run_study(fake_search.study(6), tmp_path, evaluate="test_drivers_together:evaluate")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    search(fake_search.study(6), tmp_path, url)
    assert len(read(url)) == 6 == len(fake_search.EVALUATED) and not undelivered(tmp_path)


def test_a_driver_that_is_alone_adopts_what_several_left_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, config = f"sqlite:///{tmp_path / 'one' / 'study.db'}", fake_search.study(6)
    (tmp_path / "one").mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "result", 3)
        search(config, tmp_path / "elsewhere", url)
    run_study(config, tmp_path / "one", evaluate="test_drivers_together:evaluate")
    assert len(read(url)) == 6 == len(fake_search.EVALUATED) and not undelivered(tmp_path)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ["{}", "../../{}", "sub/../../../victim", "a\0b", "", ".", "..", "x" * 300, "plain"])
def test_no_name_in_a_database_leads_out_of_the_outbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, alone: bool
) -> None:
    """A stranger wrote names and places of drivers into the database. Files that they lead to stay as they are."""
    folder, victim = tmp_path / "study", tmp_path / "victim"
    for place in (victim, victim / "sub", victim / "outbox" / "plain"):
        place.mkdir(parents=True)
        (place / "package.json").write_text("{}")
    before, name = sorted(victim.rglob("*")), name.format(victim)
    url, config = (
        f"sqlite:///{folder / 'study.db'}",
        replace(fake_search.study(3), confirm=ConfirmConfig(1, speed_seconds=0)),
    )
    folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "submitted", 2)
        search(config, folder, url)
    store = open_store(config, url, owner="a stranger", alone=False)
    (running,) = store.running()
    write = store._storage
    write.set_trial_user_attr(store._trial_ids[running.number], "owner", name)
    write.set_study_user_attr(store._study_id, "confirming:a", {"owner": name, "failed": False})
    write.set_study_user_attr(store._study_id, "confirming:b", {"owner": "plain", "failed": False})
    for driver, place in ((name, str(victim / "drivers" / "0")), ("plain", f"{victim}/drivers/0"), ("y", "y")):
        beat = {"count": None, "machine": "", "place": place}
        write.set_study_user_attr(store._study_id, f"driver:{driver}", beat)
    store.close()
    if alone:
        run_study(config, folder, evaluate="test_drivers_together:evaluate")
    else:
        search(config, folder, url)
    assert len(read(url)) == 3 and sorted(victim.rglob("*")) == before


def test_a_driver_is_known_before_it_claims_anything(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, beats = Store.begin, []

    def look_and_begin(store: Store, *arguments: Any) -> Record | None:
        beats.append(store.beats()[store.owner])
        return begin(store, *arguments)

    monkeypatch.setattr(Store, "begin", look_and_begin)
    monkeypatch.setattr("prunesearch.study.team.Team._beat", lambda team: None)  # as if the thread had not run yet
    search(fake_search.study(2), tmp_path / "one", url)
    assert len(beats) == 2
    assert all(beat.count is not None and Path(beat.place).parents[1] == tmp_path / "one" for beat in beats)


@pytest.mark.parametrize("finishes", [True, False], ids=["the other one finishes it", "the other one dies"])
def test_a_result_that_comes_late_is_kept_until_somebody_needs_it(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, finishes: bool
) -> None:
    config, uids = fake_search.study(4), []

    def take_it_over(task: Task) -> None:
        if uids or task.schedule.stages == ():
            return
        uids.append(task.uid)
        other = open_store(config, url, owner="other", alone=False)
        record = other.find(task.uid)
        assert record is not None and other.take_over(record) and other.begin_again(record.number) == 1
        if finishes:
            found = replace(fake_search.evaluate(task), host="the other one")
            fake_search.EVALUATED.pop()
            assert other.finish(replace(record, owner="other"), found) is not None
        other.close()

    monkeypatch.setattr("test_drivers_together.during", take_it_over)
    search(config, tmp_path / "late", url, lease=0.5)
    found = read(url)
    assert {record.state for record in found} == {"complete"} and len(found) == 4
    assert len(fake_search.EVALUATED) == len(set(fake_search.EVALUATED)) == 4
    (record,) = (record for record in found if record.uid == uids[0])
    assert record.evaluation is not None and (record.evaluation.host == "the other one") == finishes
    assert record.owner == ("other" if finishes else found[0].owner)
    assert not undelivered(tmp_path)


class Driver:
    """A driver that only confirms the front. It holds no file lock, so others know it by its beats alone."""

    def __init__(self, name: str, place: Path, config: StudyConfig, url: str, lease: float) -> None:
        self.config, self.folder = config, place / name
        self.outbox = self.folder / "outbox" / name
        self.store = open_store(config, url, owner=name, alone=False)
        self.team = Team(self.store, Place(name, self.folder / "drivers" / "0"), lease)

    def confirm(self, evaluate: str = "test_drivers_together:evaluate") -> None:
        workers = SerialWorkers(self.config.workers, self.outbox, evaluate)
        confirm(self.config, Crew(self.folder, self.outbox, self.store, workers, self.team))

    def time(self) -> None:
        workers = SerialWorkers(self.config.workers, self.outbox, "test_drivers_together:timer")
        time_schedules(self.config, Crew(self.folder, self.outbox, self.store, workers, self.team))

    def close(self) -> None:
        self.team.close()
        self.store.close()


@pytest.fixture
def searched(tmp_path: Path, url: str) -> Iterator[Callable[..., Driver]]:
    """A finished search whose front is to be confirmed. Returns a function that makes a driver by name.

    A busy machine may stop any process for seconds, so no test waits for a driver that lives with a short lease.
    """
    search(fake_search.study(12), tmp_path / "searcher", url)
    fake_search.EVALUATED.clear()
    made: list[Driver] = []

    def make(name: str, lease: float = 60.0) -> Driver:
        made.append(Driver(name, tmp_path, replace(fake_search.study(12), confirm=ConfirmConfig(seeds=2)), url, lease))
        return made[-1]

    yield make
    for driver in made:
        driver.close()


def test_each_confirmation_is_made_by_one_of_the_drivers(
    searched: Callable[..., Driver], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers = [searched(name) for name in ("one", "two", "three")]
    who: set[str] = set()

    def take_a_while(task: Task) -> None:
        who.add(threading.current_thread().name)
        time.sleep(0.05)

    monkeypatch.setattr("test_drivers_together.during", take_a_while)
    threads = [threading.Thread(target=driver.confirm) for driver in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    confirmed = [one.uid for record in read(url) for one in record.confirmations]
    assert sorted(fake_search.EVALUATED) == sorted(f"{uid} 0" for uid in confirmed) and len(confirmed) >= 4
    assert len(who) > 1, "one did everything"
    assert missing(drivers[0].config, drivers[0].folder, read(url)) == [] and drivers[0].store.claims() == {}


def test_what_a_dead_driver_confirmed_or_claimed_is_taken_over(searched: Callable[..., Driver], url: str) -> None:
    dead, late, other = searched("dead"), searched("late"), searched("other")
    first, second, *rest = missing(dead.config, dead.folder, dead.store.records())
    for one in (first, second):
        assert dead.store.claim(one.record.uid, one.index, one.task.uid, None)
    evaluate_into(dead.outbox, evaluate, first.task)
    write_atomically(dead.outbox / "bad.json", b"[" * 100_000)
    dead.team.close()
    other.confirm()
    assert sorted(fake_search.EVALUATED) == sorted(f"{one.task.uid} 0" for one in (first, second, *rest))
    own = replace(evaluate(second.task), host="the one that was dead")
    assert not dead.store.confirm(second.record.uid, second.index, own), "it is there already"
    assert missing(late.config, late.folder, read(url)) == [] and undelivered(dead.folder) == ["bad.json"]


def test_a_claim_of_one_that_lives_is_waited_for(
    searched: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For leases on end. Time is measured in beats of the one that lives, so that a busy machine makes both slower."""
    slow, other = searched("slow", lease=0.2), searched("other", lease=0.2)
    first = slow.team._count

    def leases() -> float:
        return (slow.team._count - first) / BEATS_PER_LEASE

    clock = SimpleNamespace(monotonic=lambda: leases() * other.team.lease, time_ns=time.time_ns)
    monkeypatch.setattr("prunesearch.study.team.time", clock)
    one = missing(slow.config, slow.folder, slow.store.records())[0]
    assert slow.store.claim(one.record.uid, one.index, one.task.uid, None)
    assert not other.store.claim(one.record.uid, one.index, one.task.uid, None)
    thread = threading.Thread(target=other.confirm)
    thread.start()
    deadline = time.monotonic() + 60
    while leases() < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert leases() >= 4
    assert thread.is_alive() and f"{one.task.uid} 0" not in fake_search.EVALUATED
    assert slow.store.confirm(one.record.uid, one.index, evaluate(one.task))
    thread.join()
    assert Counter(fake_search.EVALUATED).most_common(1)[0][1] == 1


def test_one_driver_times_the_schedules_and_the_others_wait_for_it(
    searched: Callable[..., Driver], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers = [searched(name) for name in ("one", "two", "three")]
    monkeypatch.setattr("test_drivers_together.during", lambda task: time.sleep(0.2))
    threads = [threading.Thread(target=driver.time) for driver in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake_search.EVALUATED) == 1 and drivers[0].store.claims() == {}
    speeds = [record.speed for record in read(url) if record.speed is not None]
    assert {speed.ratio for speed in speeds} == {1.0, 2.0}
    assert all(not undelivered(driver.folder) for driver in drivers)


def test_the_timing_of_a_dead_driver_is_adopted_or_made_by_another(searched: Callable[..., Driver], url: str) -> None:
    for name, finished in (("dead", True), ("deader", False)):
        dead, other = searched(name), searched(f"after {name}")
        config = replace(dead.config, confirm=ConfirmConfig(2, 1.0 + finished))  # another task than the one before
        dead.config = other.config = config
        (one,) = wanted(config, dead.folder, dead.store.records())
        assert dead.store.claim(one.of, one.index, one.task.uid, None)
        if finished:
            evaluate_into(dead.outbox, timer, one.task)
        dead.team.close()
        other.time()
        assert fake_search.EVALUATED.count(one.task.uid) == 1 and other.store.confirmed(one.of) == [one.task.uid]
        assert not undelivered(dead.folder)


def test_one_that_is_started_again_gives_its_claims_back(searched: Callable[..., Driver]) -> None:
    again, other = searched("again"), searched("other")
    one, two = missing(again.config, again.folder, again.store.records())[:2]
    for claimed in (one, two):
        assert again.store.claim(claimed.record.uid, claimed.index, claimed.task.uid, None)
    evaluate_into(again.outbox, evaluate, one.task)
    take_up_confirmations(again.config, again.folder, [again.outbox], again.store)
    assert again.store.claims() == {} and not undelivered(again.folder)
    assert other.store.claim(two.record.uid, two.index, two.task.uid, None)
    assert not other.store.claim(one.record.uid, one.index, one.task.uid, None)


at_work: set[int] = set()
all_at_work = threading.Barrier(2)


def fail(task: Task) -> Evaluation:
    """Fail, but only after both drivers have begun to evaluate."""
    fake_search.EVALUATED.append(task.uid)
    if threading.get_ident() not in at_work:
        at_work.add(threading.get_ident())
        all_at_work.wait(timeout=60)
    return Evaluation(task.uid, "failed", cause="nan", error="no luck")


def test_what_fails_is_tried_once_by_all_together_and_again_next_time(searched: Callable[..., Driver]) -> None:
    one, two = searched("one"), searched("two")
    threads = [threading.Thread(target=driver.confirm, args=("test_drivers_together:fail",)) for driver in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        len(fake_search.EVALUATED)
        == len(set(fake_search.EVALUATED))
        == len(missing(one.config, one.folder, one.store.records()))
    )
    one.confirm()
    assert missing(one.config, one.folder, one.store.records()) == []
