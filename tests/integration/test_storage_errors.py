"""Storage errors are clear messages; a read-only study can be read and is not changed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fake_search import study
from test_study import RECORD, evaluation

from prunesearch.cli import main
from prunesearch.errors import PruneSearchError, RunError, StudyError
from prunesearch.record import Record
from prunesearch.search.driver import run_study
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.storage import storage_url
from prunesearch.study.store import open_store

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A study with one candidate, in a folder that all users can access (pytest's folders are private)."""
    above = Path(tempfile.mkdtemp())
    above.chmod(0o755)
    folder = above / "fake"
    store = open_store(study(), storage_url(folder))
    store.finish(store.begin(RECORD, {}), evaluation())
    store.close()
    yield folder
    shutil.rmtree(above)


@pytest.fixture
def powerless() -> Iterator[Callable[[Path], None]]:
    """Make a folder read-only. Permissions do not apply to root, so root becomes another user within the test."""
    changed: list[Path] = []
    before = os.geteuid()

    def make(folder: Path) -> None:
        for path in (folder, *folder.iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
            changed.append(path)
        if before == 0:
            os.seteuid(NOBODY)

    yield make
    os.seteuid(before)
    for path in changed:
        path.chmod(0o755)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def look(folder: Path) -> list[Record]:
    reader = open_study_readonly(folder)
    try:
        return reader.records()
    finally:
        reader.close()


def crash(folder: Path, with_index: bool) -> None:
    """Leave the database as after a kill: a second candidate is in the WAL only."""
    store = open_store(study(), storage_url(folder))
    store.begin(Record(-1, "def", RECORD.schedule, "running", "sampler", 1), {})
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    store.close()
    shutil.rmtree(folder)
    copy.rename(folder)
    assert (folder / "study.db-wal").stat().st_size > 0
    if not with_index:
        (folder / "study.db-shm").unlink()


@pytest.mark.parametrize("state", ["closed", "killed", "killed, without -shm", "empty -wal", "rollback journal"])
@pytest.mark.parametrize("is_writable", [True, False])
def test_looking_works_without_writing(
    folder: Path,
    powerless: Callable[[Path], None],
    state: str,
    is_writable: bool,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    if state.startswith("killed"):
        crash(folder, with_index=state == "killed")
    if state == "empty -wal":
        (folder / "study.db-wal").touch()
    if state == "rollback journal":
        with closing(sqlite3.connect(folder / "study.db")) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")
    before = content(folder)
    if not is_writable:
        powerless(folder)
    assert [record.uid for record in look(folder)] == ["abc", "def"][: 1 + state.startswith("killed")]
    for verb in ("status", "front"):
        assert main([verb, str(folder)]) == 0
    after = content(folder)
    assert after.keys() == before.keys()
    assert after["study.db"] == before["study.db"] and after.get("study.db-wal") == before.get("study.db-wal")


def test_a_reader_sees_what_comes_after_a_look_without_a_log(folder: Path) -> None:
    reader = open_study_readonly(folder)
    assert len(reader.records()) == 1 and not (folder / "study.db-wal").exists()
    store = open_store(study(), storage_url(folder))
    store.begin(Record(-1, "def", RECORD.schedule, "running", "sampler", 1), {})
    assert len(reader.records()) == 2
    store.close()
    assert len(reader.records()) == 2
    reader.close()


def test_a_run_where_nothing_can_be_written_says_so(folder: Path, powerless: Callable[[Path], None]) -> None:
    (folder / "study.db").chmod(0o444)
    powerless(folder)
    with pytest.raises(StudyError, match=r"study.db.* cannot be opened: .*(readonly|unable to open).*\. Possible: "):
        open_store(study(), storage_url(folder))


def test_a_storage_that_becomes_read_only_is_not_waited_for(folder: Path) -> None:
    store = open_store(study(), storage_url(folder))
    with store._storage._backend.engine.connect() as connection:  # type: ignore[attr-defined]
        connection.exec_driver_sql("PRAGMA query_only=ON")
    with pytest.raises(RunError, match=r"storage: .*study.db: attempt to write a readonly database\. What was written"):
        store.begin(RECORD, {})
    store.close()


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


def without_its_first_page(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(bytes(4096))


def without_its_middle(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(8192)
        opened.write(bytes(size - 8192))


def random_bytes(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 64)


def text(file: Path) -> None:
    file.write_text("trial,top1\n1,90\n")


def nothing(file: Path) -> None:
    file.write_bytes(b"")


def another_schema(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.0.0'")
        connection.commit()


def other_tables(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()


DAMAGES = [truncated, without_its_first_page, without_its_middle, random_bytes, text, nothing, other_tables]


@pytest.mark.parametrize("damage", [*DAMAGES, another_schema])
def test_a_damaged_database_is_named_with_what_is_left(
    folder: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "weights").mkdir()
    (folder / "study.yaml").touch()
    damage(folder / "study.db")
    before = content_of_files(folder)
    for verb in ("status", "front", "export"):
        assert main([verb, str(folder)]) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("prunesearch: ") and str(folder / "study.db") in said and "Traceback" not in said
        assert "exception is raised during the commit" not in said and "Possible: " in said
        if damage is another_schema:
            assert "Optuna version that made it" in said
        else:
            assert "Beside it there is weights, study.yaml" in said and ".recover" in said
    assert content_of_files(folder) == before


@pytest.mark.parametrize("damage", [truncated, without_its_first_page, without_its_middle, random_bytes, text])
def test_a_run_on_a_damaged_database_is_refused_by_name(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "study.db")
    with pytest.raises(PruneSearchError, match=r"study\.db.* \.recover|study\.db.*\.recover"):
        run_study(study(3), folder, evaluate="fake_search:evaluate")


def content_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("line", [b"\x00\xff\n", b"{}\n", b"[1]\n", b'{"op_code": 99}\n', b"[" * 100000 + b"\n"])
def test_a_damaged_journal_is_named(tmp_path: Path, line: bytes) -> None:
    url = f"journal:{tmp_path / 'study.log'}"
    open_store(study(), url).close()
    with (tmp_path / "study.log").open("ab") as file:
        file.write(line + b'{"op_code": 99}\n')
    with pytest.raises(StudyError, match=r"study\.log cannot be opened: .*damaged"):
        open_study_readonly(storage=url)


def test_a_journal_that_can_only_be_read_is_read(folder: Path, powerless: Callable[[Path], None]) -> None:
    url = f"journal:{folder / 'study.log'}"
    open_store(study(), url).close()
    powerless(folder)
    assert open_study_readonly(storage=url).records() == []
    with pytest.raises(RunError, match=r"storage: .*study\.log: .*Permission denied"):
        open_store(study(), f"journal:{folder / 'study.log'}").begin(RECORD, {})
