"""A search starts whatever is in its outbox; a file that several drivers adopt counts once."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dying import Killed, die_at
from fake_search import SHAPE, SPACE, evaluate, records, run, small_study, study

from prunesearch.config import StudyConfig
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import write_atomically
from prunesearch.samplers.propose import seed_of
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.confirm import take_up_confirmations
from prunesearch.search.driver import run_study
from prunesearch.search.events import Started
from prunesearch.search.recovery import Recovery
from prunesearch.search.state import SearchState
from prunesearch.search.tasks import task_of
from prunesearch.space.choices import dimensions, uid_of
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.study.store import open_store
from prunesearch.workers import outbox as outbox_module
from prunesearch.workers.outbox import MOST_BYTES, delivered, discard

Entry = dict[str, Any]
DEEP = 100_000


def changed(change: Callable[[Entry], object]) -> Callable[[Path, Entry], None]:
    """Write the entry with changed values."""

    def make(path: Path, entry: Entry) -> None:
        entry = json.loads(json.dumps(entry))
        change(entry)
        path.write_text(json.dumps(entry))

    return make


def text(content: str) -> Callable[[Path, Entry], None]:
    return lambda path, entry: path.write_text(content) and None


def huge(path: Path, entry: Entry) -> None:
    with path.open("w") as file:
        file.truncate(MOST_BYTES + 1)


BAD: dict[str, Callable[[Path, Entry], object]] = {
    "not JSON": text("{"),
    "nothing": lambda path, entry: path.touch(),
    "no text": lambda path, entry: path.write_bytes(b"\xff\xfe\x00"),
    "deep": text("[" * DEEP + "]" * DEEP),
    "deep task": text('{"task": ' + '{"model":' * DEEP + "1" + "}" * DEEP + "}"),
    "a number": text("1"),
    "a list": text("[]"),
    "null": text("null"),
    "empty task": text('{"task": {}, "evaluation": {}}'),
    "huge": huge,
    "folder": lambda path, entry: path.mkdir(),
    "pipe": lambda path, entry: os.mkfifo(path),
    "link to nowhere": lambda path, entry: path.symlink_to(path / "nowhere"),
    "link to a folder": lambda path, entry: path.symlink_to(path.parent),
    "wrong types": changed(lambda entry: entry["evaluation"].update(metrics=[1, 2])),
    "rung as text": changed(lambda entry: entry["task"].update(rung="0")),
    "rung below zero": changed(lambda entry: (entry["task"].update(rung=-1), entry["evaluation"].update(rung=-1))),
    "rung too high": changed(lambda entry: (entry["task"].update(rung=7), entry["evaluation"].update(rung=7))),
    "rung beyond all": changed(lambda entry: entry["task"].update(rung=10**30)),
    "result of another": changed(lambda entry: entry["evaluation"].update(uid="fedcba987654")),
    "uid of another": changed(lambda entry: (entry["task"].update(uid="00"), entry["evaluation"].update(uid="00"))),
    "another seed": changed(lambda entry: entry["task"].update(seed=99)),
    "another model": changed(lambda entry: entry["task"]["model"].update(name="deit_tiny_patch16_224")),
    "block beyond the model": changed(lambda entry: entry["task"].update(schedule={"stages": [stage(block=99)]})),
    "score of nobody": changed(lambda entry: entry["task"].update(schedule={"stages": [stage(score="none")]})),
    "parameters of another space": changed(lambda entry: new_candidate(entry, {"nonsense": 1})),
    "parameters beyond the space": changed(lambda entry: new_candidate(entry, dict.fromkeys(dimensions(SPACE), 7))),
}


def new_candidate(entry: Entry, parameters: Entry) -> None:
    """A valid result for a schedule that the study does not have."""
    schedule = Schedule((Stage(3, keep=0.5),))
    uid = uid_of(schedule, SHAPE)
    about = {"uid": uid, "seed": seed_of(0, uid), "schedule": to_mapping(schedule), "parameters": parameters}
    entry["task"].update(about)
    entry["evaluation"].update(uid=uid)


def stage(**changes: Any) -> dict[str, Any]:
    return {"block": 2, "keep": 0.5, "score": "class_attention", "reduce": "drop", **changes}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Entry]:
    """A study of two candidates with a third result in the outbox; with the name and content of that file."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "result", 3)
        run(study(4), folder)
    (path,) = (folder / "outbox").glob("*.json")
    return folder, path.name, json.loads(path.read_text())


def test_no_file_in_an_outbox_stops_a_search(
    left: tuple[Path, str, Entry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, entry = left
    shutil.copytree(folder, tmp_path / "study")
    place = tmp_path / "study" / "outbox"
    for number, make in enumerate(BAD.values()):
        make(place / f"bad{number}.0.0.json", entry)
    with caplog.at_level(logging.WARNING):
        done, events = run(study(4), tmp_path / "study")
    started = events[0]
    assert isinstance(started, Started) and (started.recovered, done.complete) == (1, 4)
    for number, kind in enumerate(BAD):
        assert f"bad{number}.0.0.json was not adopted" in caplog.text, kind
        assert os.path.lexists(place / f"bad{number}.0.0.aside"), kind
        assert not os.path.lexists(place / f"bad{number}.0.0.json"), kind


@pytest.mark.parametrize("kind", ["deep", "folder", "huge", "another seed"])
def test_what_cannot_be_moved_stays(
    left: tuple[Path, str, Entry],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    folder, _, entry = left
    shutil.copytree(folder, tmp_path / "study")
    bad = tmp_path / "study" / "outbox" / "bad.0.0.json"
    BAD[kind](bad, entry)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with caplog.at_level(logging.WARNING):
        assert run(study(4), tmp_path / "study")[0].complete == 4
    assert bad.exists() and "bad.0.0.json was not adopted" in caplog.text and "stays there" in caplog.text


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_cannot_be_read_is_named(
    left: tuple[Path, str, Entry],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    folder, _, entry = left
    shutil.copytree(folder, tmp_path / "study")
    closed = tmp_path / "study" / "outbox" / ("closed" if what == "folder" else "closed.0.0.json")
    closed.mkdir() if what == "folder" else changed(len)(closed, entry)
    function = {"file": (Path, "read_text"), "folder": (os, "listdir")}[what]
    call = getattr(*function)

    def read(path: Path, **options: Any) -> Any:
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return call(path, **options)

    monkeypatch.setattr(*function, read)
    with caplog.at_level(logging.WARNING):
        done, events = run(study(4), tmp_path / "study")
    assert isinstance(events[0], Started) and (events[0].recovered, done.complete) == (1, 4)
    assert closed.name in caplog.text and "Permission denied" in caplog.text


def test_files_may_vanish_at_any_moment(left: tuple[Path, str, Entry], tmp_path: Path) -> None:
    """A file may vanish before any call of the operating system: after listing, or after stat."""
    _, name, entry = left
    for moment in ("lstat", "stat", "read_text", "rename", "unlink"):
        with pytest.MonkeyPatch.context() as patch:
            place = tmp_path / moment
            place.mkdir()
            for number in range(3):
                changed(len)(place / f"{number}.{name}", entry)
            (place / "bad.json").touch()
            call = getattr(Path, moment)

            def too_late(path: Path, *arguments: Any, call: Callable[..., Any] = call, **options: Any) -> Any:
                if path.suffix == ".json":
                    os.unlink(path)
                return call(path, *arguments, **options)

            patch.setattr(Path, moment, too_late)
            found = delivered(place)
            assert len(found) == (0 if moment in ("lstat", "stat", "read_text") else 3)
            discard(place, f"0.{entry['task']['uid']}", 0)
            assert moment == "unlink" or not list(place.glob("*.aside"))


def test_a_result_that_was_set_aside_before_is_kept(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "x.json").write_text(content)
        assert delivered(tmp_path) == []
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["first", "second"]


def test_two_drivers_that_adopt_the_same_file_count_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second driver adopts after the first one has read the outbox and before it writes."""
    config, url = study(4), f"sqlite:///{tmp_path / 'study.db'}"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "result", 2)
        run_study(config, tmp_path / "dead", storage=url, evaluate="fake_search:evaluate")
    (path,) = tmp_path.rglob("outbox/**/*.json")
    dead, first, second = path.parent.name, *(recovery_of(name, config, tmp_path, url) for name in ("first", "second"))
    read, adopted = outbox_module.delivered, []

    def read_and_let_another_one_adopt(place: Path, *how: bool) -> Any:
        found = read(place, *how)
        monkeypatch.setattr("prunesearch.search.recovery.delivered", read)
        adopted.extend(second.adopt(place, {dead}))
        return found

    monkeypatch.setattr("prunesearch.search.recovery.delivered", read_and_let_another_one_adopt)
    adopted.extend(first.adopt(path.parent, {dead}))
    assert [record.state for record in adopted] == ["complete"]
    assert [record.state for record in first.store.records()] == ["complete"] * 2
    assert not path.exists() and not list(path.parent.iterdir())
    for recovery in (first, second):
        recovery.store.close()


def recovery_of(name: str, config: StudyConfig, place: Path, url: str) -> Recovery:
    store = open_store(config, url, owner=name, alone=False)
    return Recovery(SearchState(config, SHAPE, [], store.records()), store, place / name)


@pytest.mark.parametrize("kind", ["deep", "folder", "wrong types", "link to nowhere"])
def test_no_file_stops_a_confirmation(tmp_path: Path, left: tuple[Path, str, Entry], kind: str) -> None:
    config = study(2)
    run(config, tmp_path)
    uid = records(tmp_path)[1].uid
    BAD[kind](tmp_path / "outbox" / f"{uid}.validation0.0.0.json", left[2])
    task = replace(from_mapping(Task, left[2]["task"], "left"), uid=f"{uid}.validation{9**9}")
    entry = {"task": to_mapping(task), "evaluation": to_mapping(Evaluation(task.uid, "complete"))}
    write_atomically(tmp_path / "outbox" / f"{task.uid}.0.0.json", json.dumps(entry).encode())
    store = open_store(config, f"journal:{tmp_path / 'study.log'}")
    take_up_confirmations(config, tmp_path, [tmp_path / "outbox"], store)
    store.close()
    assert not any(record.confirmations for record in records(tmp_path))


def test_results_for_which_the_study_has_no_place_are_not_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after restoring an older copy of the database: the candidate is paused at a lower rung."""
    config = small_study(6, "random")
    run(config, tmp_path)
    low = next(record for record in records(tmp_path) if record.rung_done == 0)
    task = task_of(replace(low, rung=2), 0, config, tmp_path)
    entry = {"task": to_mapping(task), "evaluation": to_mapping(evaluate(task))}
    write_atomically(tmp_path / "outbox" / f"{low.uid}.2.0.json", json.dumps(entry).encode())
    with caplog.at_level(logging.WARNING):
        run(config, tmp_path)
    assert (tmp_path / "outbox" / f"{low.uid}.2.0.aside").exists()
    assert "is paused at rung 0 and does not wait for it" in caplog.text
