"""A study is stored in the given folder, whatever its name, and every command finds it there."""

from __future__ import annotations

import json
import os
import shlex
import socket
from pathlib import Path

import pytest
from fake_search import study

from prunesearch.cli import main
from prunesearch.errors import StudyError
from prunesearch.files import write_yaml
from prunesearch.search.driver import run_study
from prunesearch.strict import to_mapping
from prunesearch.study import storage
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.storage import sqlite_file, storage_url
from prunesearch.study.store import open_store

NASTY = [
    "p%20q",
    "p?q",
    "p#q",
    "p q",
    " p ",
    "ü%ñ中",
    "a&b=c;d",
    "{SCHEMA_VERSION}",
    "a'b\"c$HOME`x`",
    "a\nb",
    "C:\\x",
    ":memory:",
    "file:x?mode=ro",
    "-x",
    "~",
    os.fsdecode(b"\xff\xfe"),
]


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_the_database_is_in_the_named_folder(tmp_path: Path, name: str) -> None:
    store = open_store(study(), storage_url(tmp_path / name))
    reader = open_study_readonly(tmp_path / name)
    assert reader.config == study() and reader.records() == []
    reader.close()
    store.close()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [name, f"{name}/study.db"]


def test_every_verb_finds_a_study_whatever_its_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders with all printable names, nested, starting with the one that looks most like an option."""
    monkeypatch.chdir(tmp_path)
    names = ["-x", *sorted(name for name in NASTY if name.isprintable() and name != "-x")]
    folder = Path(*names, "fake")
    run_study(study(2), folder, evaluate="fake_search:evaluate")
    assert {path.name for path in folder.iterdir()} == {"study.db", "study.yaml", "outbox", "lock"}
    output = f"--output={folder.parent}"
    assert main(["run", str(tmp_path / folder / "study.yaml"), "--no-progress", output]) == 0  # nothing is left to do
    command = capsys.readouterr().out.split("Next: ")[1]
    url = storage_url(folder)
    assert main(["resume", "--storage", url, "--study", "fake", "--no-progress", output]) == 0
    again = capsys.readouterr().out.split("Next: ")[1]
    for pasted in (command, again):
        program, verb, *arguments = shlex.split(pasted)
        assert (program, verb) == ("prunesearch", "front") and main([verb, *arguments, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) >= 1
        assert main(["status", *arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"study": "fake", "complete": 2}
    assert [path.name for path in tmp_path.iterdir()] == [folder.parts[0]]


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_a_url_and_its_file_are_each_other_back(name: str) -> None:
    folder = Path("/somewhere") / name
    assert sqlite_file(storage_url(folder)) == folder / "study.db"


def test_urls_that_people_write() -> None:
    assert sqlite_file("sqlite:///study.db") == Path("study.db")
    assert sqlite_file("sqlite:////disk/my%20study/100%25.db") == Path("/disk/my study/100%.db")
    assert sqlite_file("sqlite+pysqlite:////disk/my study.db") == Path("/disk/my study.db")
    assert sqlite_file("postgresql://host/x.db") is None
    assert sqlite_file("journal:/disk/x.db") is None and sqlite_file("memory:") is None


MISTAKES = {
    "": "not a URL",
    "nonsense": "not a URL",
    "outputs/x/study.db": "not a URL",
    "sqlite:": "not of the form",
    "sqlite://": "not of the form",
    "sqlite://host/x.db": "not of the form",
    "sqlite+aiosqlite:///x.db": "not of the form",
    "sqlite:///": "in memory",
    "sqlite:///:memory:": "in memory",
    "sqlite:///p?q/x.db": "%3F",
    "sqlite:///x.db?mode=ro": "options",
    "sqlite:///a%00b": "NUL",
    "journal:": "names no file",
    "postgresql://joe:secret@h:abc/db": "port is not a number",
    "postgresql://joe:secret@h:99:x/db": "port is not a number|not a URL",
    "postgres://joe:secret@h/db": "postgres is no database or driver",
    "postgresql+nothing://joe:secret@h/db": r"postgresql\+nothing is no database or driver",
    "http://joe:secret@h/db": "http is no database or driver",
    "mssql+pyodbc://joe:secret@h/db": "pyodbc that its driver needs is not installed",
    "postgresql+asyncpg://joe:secret@h/db": "asyncpg that its driver needs is not installed|asynchronous",
    "postgresql+psycopg://joe:secret@127.0.0.1:1/db": "refused",
    "postgresql+psycopg://joe:secret@nobody.invalid/db": "resolve|not known|translate",
}


@pytest.mark.parametrize("url", MISTAKES)
def test_a_url_that_cannot_be_one_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=MISTAKES[url]) as caught:
        open_study_readonly(storage=url, name="fake")
    assert "secret" not in str(caught.value) and "Possible: " in str(caught.value)
    file = tmp_path / "study.yaml"
    write_yaml(to_mapping(study(2)), file)
    for arguments in (
        ["run", str(file), "--output", "out"],
        ["resume", "--study", "fake"],
        ["front", "--study", "fake"],
    ):
        assert main([*arguments, "--storage", url]) == 2
        said = capsys.readouterr().err
        assert said.startswith("prunesearch: ") and "Traceback" not in said and "secret" not in said
    if "127.0.0.1" not in url and "nobody" not in url:
        assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_a_server_that_never_answers_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CONNECT_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(StudyError, match="timeout"):
            open_study_readonly(storage=f"postgresql+psycopg://joe:secret@127.0.0.1:{port}/db", name="fake")
