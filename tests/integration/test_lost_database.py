"""A database that is deleted, replaced or restored from an old copy is detected, and no result is deleted."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from driving import fake_search

from prunesearch.cli import main
from prunesearch.errors import RunError, StudyError
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import write_yaml
from prunesearch.search.driver import run_study
from prunesearch.strict import to_mapping
from prunesearch.study.reader import open_study_readonly

BACKED_UP, STRUCK = 2, 4
"""The evaluations during which the database is copied, and damaged."""


class Mishap:
    """Called during each evaluation: one of them makes a copy of the database, a later one damages it."""

    def __init__(self, file: Path, strike: Callable[[Path, Path], None]) -> None:
        self.file, self.strike, self.count = file, strike, 0

    def __call__(self) -> None:
        self.count += 1
        copy = self.file.with_name("copy")
        if self.count == BACKED_UP and self.file.suffix == ".db":
            with (
                contextlib.closing(sqlite3.connect(self.file)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
        elif self.count == BACKED_UP:
            shutil.copy(self.file, copy)
        if self.count == STRUCK:
            self.strike(self.file, copy)


mishap: Mishap | None = None


def evaluate(task: Task) -> Evaluation:
    assert mishap is not None
    mishap()
    return fake_search.evaluate(task)


def remove(file: Path, copy: Path) -> None:
    file.unlink()


def remove_newest_changes(file: Path, copy: Path) -> None:
    file.with_name(f"{file.name}-wal").unlink()


def remove_folder(file: Path, copy: Path) -> None:
    shutil.rmtree(file.parent)


def empty(file: Path, copy: Path) -> None:
    os.truncate(file, 0)


def replace_by_empty_file(file: Path, copy: Path) -> None:
    file.unlink()
    file.touch()


def replace_by_older_copy(file: Path, copy: Path) -> None:
    os.replace(copy, file)


def write_older_copy_over_it(file: Path, copy: Path) -> None:
    shutil.copyfile(copy, file)


def write_older_copy_over_all_of_it(file: Path, copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copyfile(copy, file)


def restore_older_copy(file: Path, copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy)) as source, contextlib.closing(sqlite3.connect(file)) as target:
        source.backup(target)


def delete_study(file: Path, copy: Path) -> None:
    storage: Any = f"sqlite:///{file}"
    if file.suffix == ".log":
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    optuna.delete_study(study_name="fake", storage=storage)


def delete_trials(file: Path, copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM trials")
        database.execute("DELETE FROM trial_user_attributes")


ANY: tuple[Callable[[Path, Path], None], ...] = (
    remove,
    remove_folder,
    empty,
    replace_by_empty_file,
    replace_by_older_copy,
    delete_study,
)
SQLITE = (remove_newest_changes, restore_older_copy, write_older_copy_over_all_of_it, delete_trials)
JOURNAL = (write_older_copy_over_it,)
CASES = [
    *((drivers, "study.db", strike) for strike in ANY + SQLITE for drivers in ("alone", "several")),
    *(("alone", "study.log", strike) for strike in ANY + JOURNAL),  # a journal has one driver
]


@pytest.mark.parametrize(("drivers", "name", "strike"), CASES, ids=[f"{a}-{b}-{c.__name__}" for a, b, c in CASES])
def test_a_search_stops_when_its_database_is_not_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, strike: Callable[[Path, Path], None], drivers: str
) -> None:
    folder = tmp_path / "study"
    named = {"study.db": f"sqlite:///{folder / name}", "study.log": f"journal:{folder / name}"}[name]
    storage = None if drivers == "alone" and name == "study.db" else named
    monkeypatch.setattr("test_lost_database.mishap", Mishap(folder / name, strike))
    monkeypatch.setattr("prunesearch.study.storage.PAUSE_SECONDS", 0.01)
    with pytest.raises(RunError) as caught:
        run_study(fake_search.study(8), folder, storage=storage, evaluate="test_lost_database:evaluate")
    assert mishap is not None and mishap.count == STRUCK, "it went on"
    assert "outbox" in str(caught.value) and "run the study again" in str(caught.value), caught.value
    assert len(list(folder.rglob("outbox/**/*.json"))) == 1, "the result that the database does not have"


def test_an_older_copy_under_the_newest_changes_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_lost_database.mishap", Mishap(tmp_path / "study.db", write_older_copy_over_it))
    run_study(fake_search.study(8), tmp_path, evaluate="test_lost_database:evaluate")
    reader = open_study_readonly(tmp_path)
    assert [record.state for record in reader.records()] == ["complete"] * 8
    reader.close()


@pytest.mark.parametrize("name", ["study.db", "study.log"])
@pytest.mark.parametrize("strike", [remove, empty, replace_by_empty_file, delete_study])
def test_a_folder_whose_database_is_lost_is_not_started_over(
    tmp_path: Path, strike: Callable[[Path, Path], None], name: str
) -> None:
    config, folder = fake_search.small_study(4, "random"), tmp_path / "fake"
    storage = {"study.db": None, "study.log": f"journal:{folder / name}"}[name]
    run_study(config, folder, storage=storage, evaluate="fake_search:evaluate")
    strike(folder / name, folder / "copy")
    before = files(folder)
    with pytest.raises(StudyError, match=r"study.yaml and \d+ files in weights.*no such study.*Put the database back"):
        run_study(config, folder, storage=storage, evaluate="fake_search:evaluate")
    assert files(folder) == before, "nothing was made or removed"
    other = fake_search.small_study(4, "random", name="other")
    assert run_study(other, folder, storage=storage, evaluate="fake_search:evaluate").reason == "trials"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.name.endswith(("-wal", "-shm")))


def test_the_command_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = fake_search.small_study(2, "random"), tmp_path / "fake"
    run_study(config, folder, evaluate="fake_search:evaluate")
    (folder / "study.db").unlink()
    write_yaml(to_mapping(config), tmp_path / "study.yaml")
    assert main(["run", str(tmp_path / "study.yaml"), "--output", str(tmp_path), "--no-progress"]) == 2
    assert "Put the database back" in capsys.readouterr().err


def test_a_study_without_weights_may_begin_anew(tmp_path: Path) -> None:
    run_study(fake_search.study(2), tmp_path, evaluate="fake_search:evaluate")
    (tmp_path / "study.db").unlink()
    run_study(fake_search.study(3), tmp_path, evaluate="fake_search:evaluate")
    reader = open_study_readonly(tmp_path)
    assert len(reader.records()) == 3
    reader.close()
