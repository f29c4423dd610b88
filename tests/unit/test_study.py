"""Storage of a study: readable during a search and by Optuna; other settings are refused."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_profiles import fake_profile
from fake_search import SHAPE, SPACE, run, study

from prunesearch.config import (
    BlockSpace,
    Budget,
    DataConfig,
    DeviceConfig,
    Limit,
    MeasureConfig,
    ModelConfig,
    Objective,
    SamplerConfig,
    StopConfig,
    StudyConfig,
    WorkersConfig,
)
from prunesearch.errors import RunError, StudyError
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record
from prunesearch.schedule import Schedule, Stage
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.storage import close_storage, open_storage, storage_url
from prunesearch.study.store import Store, open_store

LIMITED = study(limits=(("gmacs", Limit(at_most=0.01)), ("latency_ms", Limit(at_most=3.0))))
RECORD = Record(-1, "abc", Schedule((Stage(2, keep=0.7), Stage(4, keep=0.5, reduce="merge"))), "running", "sampler", 42)


def evaluation(uid: str = "abc", top1: float = 91.5, latency: float = 2.5) -> Evaluation:
    metrics = (("gmacs", 0.009), ("latency_ms", latency), ("top1", top1))
    return Evaluation(
        uid, "complete", metrics=metrics, tokens=(65, 65, 65, 46, 46, 23, 23, 23), seconds=(("train", 1.0),)
    )


@pytest.fixture(params=["sqlite", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return storage_url(tmp_path) if request.param == "sqlite" else f"journal:{tmp_path / 'deep' / 'study.log'}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(LIMITED, url)
    yield store
    store.close()


def test_a_candidate_is_written_and_read_back(store: Store, url: str) -> None:
    begun = store.begin(RECORD, {"gmacs": -0.001})
    assert begun == replace(RECORD, number=0, parameters=begun.parameters, owner=begun.owner)
    reader = open_study_readonly(storage=url, name="fake")
    assert reader.records() == [begun] and reader.config == LIMITED
    complete = store.finish(begun, evaluation())
    assert reader.records() == [complete] == store.records()  # a reader sees later changes
    assert (complete.state, complete.evaluation) == ("complete", evaluation())
    failure = Evaluation("def", "failed", cause="oom", error="no memory", traceback="...")
    failed = store.finish(store.begin(replace(RECORD, uid="def"), {}), failure)
    assert open_study_readonly(storage=url).records() == [complete, failed]
    assert (failed.number, failed.state, failed.evaluation) == (1, "failed", failure)
    reader.close()


def test_attempts_are_counted_across_processes(store: Store, url: str) -> None:
    number = store.begin(RECORD, {}).number
    assert store.begin_again(number) == 1
    store.close()
    again = open_store(LIMITED, url)
    assert again.begin_again(number) == 2
    again.close()


def test_finishing_can_be_repeated_when_it_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(*args: object) -> None:
        raise Killed

    store = open_store(LIMITED, f"journal:{tmp_path / 'study.log'}")  # in a database it is one transaction
    begun = store.begin(RECORD, {"gmacs": -0.001})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store._storage, "set_trial_state_values", die)
        store.finish(begun, evaluation())
    (half,) = store.records()
    assert half.state == "running" and half.evaluation == evaluation()
    assert store.finish(half, evaluation()).evaluations == (evaluation(),)
    assert store.records()[0].state == "complete"


def test_optuna_reads_it_as_a_study_of_its_own(tmp_path: Path) -> None:
    store = open_store(LIMITED, storage_url(tmp_path))
    for number, (top1, latency) in enumerate([(90.0, 2.0), (95.0, 4.0), (91.0, 2.5)]):
        begun = store.begin(replace(RECORD, uid=str(number)), {"gmacs": -0.001})
        store.finish(begun, evaluation(str(number), top1, latency))
    store.begin(replace(RECORD, uid="dense", schedule=Schedule((Stage(7, tokens=3),))), {})  # outside the space
    store.close()
    study = optuna.load_study(study_name="fake", storage=storage_url(tmp_path))
    assert study.metric_names == ["top1", "gmacs"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    trial = study.trials[0]
    assert trial.values == [90.0, 0.009]
    assert trial.params["block2.keep"] == 0.7 and trial.params["block4.reduce"] == "merge"
    assert trial.constraints == {"gmacs": -0.001, "latency_ms": -1.0}
    assert [trial.number for trial in study.best_trials] == [2]  # 1 is better, but beyond a limit
    assert {"uid", "schedule", "origin", "seed", "owner", "attempts", "rung:0"} == trial.user_attrs.keys()
    assert study.trials[3].params == {}
    about = study.user_attrs
    assert about["sampler"] == "random" and about["config"]["name"] == "fake"
    assert len(about["space_hash"]) == len(about["objectives_hash"]) == 16 and about["prunesearch"]


DIFFERENT: dict[str, dict[str, Any]] = {
    'space.reduce: ["drop", "fuse", "merge"] -> ["drop"]': {"space": replace(SPACE, reduce=("drop",))},
    "space.blocks: [1, 2, 3, 4, 5] -> [1,": {"space": replace(SPACE, blocks=(1, BlockSpace(2, keep=(0.5,))))},
    "objectives: [": {"objectives": (Objective("top1", "maximize"),)},
    'model.name: "vit_digits_patch1_8" -> "other"': {"model": ModelConfig("other")},
    "model.options.depth: absent -> 4": {"model": ModelConfig("vit_digits_patch1_8", options=(("depth", 4),))},
    "data.val_images: absent -> 100": {"data": DataConfig(val_images=100)},
    "limits.gmacs.at_most: 0.01 -> 0.02": {"limits": (("gmacs", Limit(0.02)), ("latency_ms", Limit(3.0)))},
    "measure.batch_size: 128 -> 64": {"measure": MeasureConfig(batch_size=64)},
    'rungs: [{"images": 0}] -> [{"images": 10}]': {"rungs": (Budget(images=10),)},
    "sampler.seed: 0 -> 1": {"sampler": SamplerConfig("random", seed=1)},
    'sampler.name: "random" -> "tpe"': {"sampler": SamplerConfig("tpe")},
}


@pytest.mark.parametrize(("line", "changes"), DIFFERENT.items(), ids=DIFFERENT)
def test_other_settings_are_refused_with_the_differences(
    store: Store, url: str, line: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(StudyError) as caught:
        open_store(replace(LIMITED, **changes), url)
    message = str(caught.value)
    assert line in message and message.count("\n  - ") == 1
    assert "another name" in message and "undo the change" in message
    assert open_study_readonly(storage=url).config == LIMITED


def test_what_changes_no_number_may_change(store: Store, url: str) -> None:
    changed = replace(
        LIMITED,
        workers=WorkersConfig(kind="ray", count=3),
        stop=StopConfig(trials=1000),
        metrics=("loss",),
        data=DataConfig(loaders=7, in_memory=False),
    )
    open_store(changed, url).close()
    assert open_study_readonly(storage=url).config == changed


def test_studies_share_a_storage_by_name(store: Store, url: str) -> None:
    store.begin(RECORD, {})
    open_store(replace(LIMITED, name="second", sampler=SamplerConfig("tpe")), url).close()
    assert open_study_readonly(storage=url, name="second").records() == []
    with pytest.raises(StudyError, match=r"has 2 studies. Possible: fake, second"):
        open_study_readonly(storage=url)
    with pytest.raises(StudyError, match=r"has no study 'third'. Possible: fake, second"):
        open_study_readonly(storage=url, name="third")


def test_a_study_that_was_killed_while_it_was_made_is_completed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prunesearch.study.store._describe", die)
        open_store(LIMITED, url)
    store = open_store(LIMITED, url)
    assert store.records() == [] and open_study_readonly(storage=url).config == LIMITED
    store.close()


def test_somebody_elses_study_is_left_alone(tmp_path: Path) -> None:
    theirs = optuna.create_study(study_name="fake", storage=storage_url(tmp_path), directions=["maximize", "minimize"])
    theirs.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    with pytest.raises(StudyError, match="not made by prunesearch"):
        open_store(LIMITED, storage_url(tmp_path))
    assert len(theirs.trials) == 1


def measured(ms: float) -> StudyConfig:
    """A study whose driver has measured the profile of its device: what is outside the blocks takes so long."""
    return replace(LIMITED, device=DeviceConfig(table=replace(fake_profile(SHAPE), fixed=ms)))


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (LIMITED, LIMITED),
        (LIMITED, replace(LIMITED, sampler=SamplerConfig(seed=9))),
        (measured(1.0), measured(1.1)),
        (measured(1.0), replace(measured(1.1), sampler=SamplerConfig(seed=9))),
    ],
    ids=["same", "others", "another measurement", "another measurement and others"],
)
def test_a_study_that_another_driver_begins_meanwhile_is_shared(
    tmp_path: Path, mine: StudyConfig, other: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver does all it does at the start before the n-th call of the storage, for every n."""
    empty = tmp_path / "empty.db"
    close_storage(open_storage(f"sqlite:///{empty}", writing=True))  # copied, because making the tables is slow
    turn = 0
    while _opens_while_another_begins(shutil.copy(empty, tmp_path / f"{turn}.db"), mine, other, turn, monkeypatch):
        turn += 1
    assert turn >= 6


def _opens_while_another_begins(
    file: Path, mine: StudyConfig, other: StudyConfig, turn: int, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Open a study; returns False when the storage was not called `turn` times, so that no other driver came."""
    calls, opened, url = 0, [], f"sqlite:///{file}"

    def open_counted(url: str, writing: bool) -> Any:
        storage = open_storage(url, writing=writing)
        for name in ("create_new_study", "get_study_id_from_name", "get_n_trials", "get_study_user_attrs"):
            monkeypatch.setattr(storage, name, counted(getattr(storage, name)))
        for name in ("set_study_user_attr", "set_study_system_attr"):
            monkeypatch.setattr(storage, name, counted(getattr(storage, name)))
        return storage

    def counted(call: Any) -> Any:
        def count_and_call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == turn + 1:
                with monkeypatch.context() as patch:
                    patch.setattr("prunesearch.study.store.open_storage", open_storage)
                    begin(other, "first")
            return call(*args, **options)

        return count_and_call

    def begin(config: StudyConfig, owner: str) -> None:
        try:
            store = open_store(config, url, owner=owner, alone=False, just_measured=config.device is not None)
        except StudyError as error:
            assert "exists with other settings" in str(error)
            return
        opened.append((owner, (store.config, store.starts(lambda: [(owner, Schedule())]))))
        if owner == "first":
            assert store.begin(RECORD, {}) is not None
        store.close()

    monkeypatch.setattr("prunesearch.study.store.open_storage", open_counted)
    begin(mine, "second")
    if other.sampler == mine.sampler and turn < calls:
        assert [owner for owner, _ in opened] == ["first", "second"] and opened[0][1] == opened[1][1]
    else:
        assert len(opened) == 1, "of two drivers with other settings, one is refused"
    return turn < calls


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ("sqlite:///{folder}/none.db", "no such file"),
        ("journal:{folder}/none.log", "no such file"),
        ("nonsense", "cannot be opened"),
        ("postgresql+nodriver://u:secret@localhost/x", "cannot be opened"),
    ],
)
def test_a_storage_that_is_not_there_is_explained(tmp_path: Path, storage: str, says: str) -> None:
    with pytest.raises(StudyError, match=says) as caught:
        open_study_readonly(storage=storage.format(folder=tmp_path))
    assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())  # reading creates no file
    with pytest.raises(StudyError, match="no such file"):
        open_study_readonly(tmp_path)


def test_sqlite_is_durable_and_readable_while_it_is_written(tmp_path: Path) -> None:
    store = open_store(LIMITED, storage_url(tmp_path))
    with store._storage._backend.engine.connect() as connection:  # type: ignore[attr-defined]
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000
        reader = open_study_readonly(tmp_path)  # the transaction above holds the write lock
        assert reader.records() == []
        reader.close()
    store.close()


def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    store = open_store(LIMITED, storage_url(tmp_path))
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    released = []

    def release() -> None:
        time.sleep(0.3)
        released.append(True)
        other.execute("ROLLBACK")

    thread = threading.Thread(target=release)
    thread.start()
    assert store.begin(RECORD, {}).number == 0 and released
    thread.join()
    other.close()
    store.close()


def test_a_storage_that_breaks_is_a_failed_run(tmp_path: Path) -> None:
    store = open_store(LIMITED, storage_url(tmp_path))
    begun = store.begin(RECORD, {})
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute("DROP TABLE trial_user_attributes")
    other.close()
    with pytest.raises(RunError, match=r"storage: .*no such table.*outbox"):
        store.finish(begun, evaluation())
    store.close()


def test_a_whole_run_fits_sqlite(tmp_path: Path) -> None:
    config: StudyConfig = study(6)
    run(config, tmp_path, journal=False)
    run(replace(config, stop=StopConfig(trials=8)), tmp_path, journal=False)
    reader = open_study_readonly(tmp_path)
    assert [record.state for record in reader.records()] == ["complete"] * 8
    reader.close()
