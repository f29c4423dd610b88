"""A study's name is the name of its folder: one component of a path."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from fake_search import run, study

from prunesearch.cli import main
from prunesearch.config import study_name_problem
from prunesearch.errors import FileError
from prunesearch.files import load_study, override_study, write_yaml
from prunesearch.strict import to_mapping
from prunesearch.study.storage import storage_url
from prunesearch.study.store import open_store

BAD = [
    "",
    ".",
    "..",
    "../x",
    "/tmp/x",
    "a/b",
    "a\0b",
    "a\nb",
    "a\x1b[31m",
    "-x",
    " x",
    "x ",
    "x" * 201,
    "ü" * 101,
    "a\u2028b",
]
REFUSED = r"cannot be a study's name.* Possible: up to 200 bytes|holds the character U\+[0-9A-F]{4}; possible"
GOOD = ["deit_small", "My study (2)", "ü中", "a.b", "...", ".hidden", "100%", "x" * 200, "a\\b"]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_name_that_leaves_its_folder_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for_file = to_mapping(study())
    write_yaml({**for_file, "name": name}, "bad.yaml")
    write_yaml(for_file, "good.yaml")
    with pytest.raises(FileError, match=REFUSED):
        load_study("bad.yaml")
    with pytest.raises(FileError, match=r"name: .* cannot be a study's name"):
        run(replace(study(), name=name), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for verb in ("check", "run"):
        assert main([verb, "bad.yaml"]) == 2
        assert re.search(REFUSED, capsys.readouterr().err)
    if name.isprintable():
        assert main(["run", "good.yaml", "--set", f'name="{name}"']) == 2
        assert "cannot be a study's name" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "good.yaml"]


@pytest.mark.parametrize("name", GOOD, ids=ascii)
def test_other_names_are_taken(tmp_path: Path, name: str) -> None:
    assert study_name_problem(name) is None
    assert override_study(study(), [f"name='{name}'"]).name == name
    (tmp_path / name).mkdir()


def test_a_study_with_an_odd_name_in_a_database_can_be_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = storage_url(tmp_path / "there")
    open_store(replace(study(), name="../odd"), url).close()
    for verb in ("status", "front"):
        assert main([verb, "--storage", url, "--study", "../odd"]) == 0
    assert main(["resume", "--storage", url, "--study", "../odd"]) == 2
    assert "cannot be a study's name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
