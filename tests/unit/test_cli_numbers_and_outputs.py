"""Impossible numbers and unwritable outputs are reported before any work is done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from prunesearch import cli
from prunesearch.cli import main
from prunesearch.errors import UserError
from prunesearch.files import load_schedule, save_schedule
from prunesearch.schedule import Schedule, Stage


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["run", "x.yaml"], "--trials"),
        (["resume", "x"], "--trials"),
        (["confirm", "x"], "--seeds"),
        (["sensitivity", "x.yaml"], "--images"),
        (["freeze", "x.yaml"], "--images"),
    ],
)
@pytest.mark.parametrize("number", ["-3", "0", "1.5", "nan", "", "1e3", "x", "9" * 30])
def test_counts_are_whole_numbers_from_one(
    arguments: list[str], flag: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, flag, number]) == 2
    assert capsys.readouterr().err == f"prunesearch: {flag} {number}: possible: a whole number from 1. Correct it.\n"


@pytest.mark.parametrize("number", ["-1", "x", "1.5"])
def test_trials_have_numbers_from_zero(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "x", "--trial", number]) == 2
    assert f"--trial {number}: possible: a whole number from 0" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--at-most", "--at-least"])
@pytest.mark.parametrize("bound", ["gmacs=nan", "x=inf", "x=-inf", "gmacs", "=3", "gmacs=", "gmacs=x"])
def test_bounds_are_finite(flag: str, bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "x", flag, bound]) == 2
    assert f"{flag} {bound}: possible: metric=number" in capsys.readouterr().err


def test_a_metric_that_says_nothing_here_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"name": "vit_digits_patch1_8", "num_classes": 10, "options": {"depth": 2}}
    data = {"name": "digits", "train_images": 20, "val_images": 20}
    save_schedule(Schedule((Stage(1, keep=0.5),)), tmp_path / "a.yaml", model=model, data=data)
    where = [str(tmp_path / "a.yaml"), "--metric"]
    for flags, said in (
        (["top_5"], "unknown metric 'top_5'"),
        (["top1", "--set", "model.num_classes=3"], "Write num_classes: 10"),
        (["top1", "--data", "folder", "--root", "/nowhere"], "'/nowhere' is not there"),
        (["top1", "--device", "gpu"], "'gpu' is not available"),
    ):
        assert main(["evaluate", *where, *flags]) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error


OUTPUTS = [
    ["export", "STUDY", "-o", "PLACE"],
    ["export", "STUDY", "--onnx", "PLACE"],
    ["export", "STUDY", "--openvino", "PLACE"],
    ["front", "STUDY", "--plot", "PLACE"],
    ["freeze", "FILE", "-o", "PLACE"],
    ["sensitivity", "FILE", "-o", "PLACE"],
    ["sensitivity", "FILE", "--plot", "PLACE"],
    ["import-diffrate", "FILE", "--model", "m", "--target", "1", "-o", "PLACE"],
]


STUDY = "version: 1\nname: x\nmodel: {name: vit_digits_patch1_8}\nspace: {blocks: [1]}\n"


def write_input(verb: str, path: Path) -> None:
    """Write the input of a command: a study for sensitivity, else DiffRate's counts."""
    counts = str([197 - 10 * block for block in range(12)])
    diffrate = f'{{"m": {{"1": {{"prune_kept_num": "{counts}", "merge_kept_num": "{counts}"}}}}}}'
    path.write_text(STUDY if verb == "sensitivity" else diffrate)


@pytest.mark.parametrize("arguments", OUTPUTS, ids=lambda arguments: " ".join(arguments))
@pytest.mark.parametrize("wrong", ["a folder", "below a file", "not writable"])
def test_an_output_that_cannot_be_written_is_said_before_the_work(
    arguments: list[str],
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    write_input(arguments[0], tmp_path / "input")
    places = {"a folder": "folder", "below a file": "file/a.png", "not writable": "folder/new/a.png"}
    if wrong == "not writable":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    names = {"STUDY": "no study", "FILE": "input", "PLACE": places[wrong]}
    assert main([str(tmp_path / names[one]) if one in names else one for one in arguments]) == 2
    said = {"a folder": "it is a folder", "below a file": "is a file", "not writable": "nothing can be written to"}
    assert said[wrong] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", OUTPUTS, ids=lambda arguments: " ".join(arguments))
def test_an_output_that_is_no_file_is_refused_and_stays(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    write_input(arguments[0], tmp_path / "input")
    names = {"STUDY": "no study", "FILE": "input", "PLACE": "pipe.png"}
    assert main([str(tmp_path / names[one]) if one in names else one for one in arguments]) == 2
    assert "it is a pipe or a device" in capsys.readouterr().err
    assert (tmp_path / "pipe.png").is_fifo()


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a.yaml").symlink_to(tmp_path / "real" / "b.yaml")
    save_schedule(Schedule((Stage(1, keep=0.5),)), tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").is_symlink() and (tmp_path / "real" / "b.yaml").read_text().startswith("#")
    with pytest.raises(UserError, match="it is a folder"):
        save_schedule(Schedule((Stage(1, keep=0.5),)), tmp_path / "real")


def test_a_name_that_is_no_text_is_written_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"e\xff.yaml")
    save_schedule(Schedule((Stage(1, keep=0.5),)), odd)
    assert load_schedule(odd) == Schedule((Stage(1, keep=0.5),))


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "x" * 5000],
        ["run", "x" * 5000],
        ["run", "STUDY", "--output", "x" * 5000],
        ["run", "STUDY", "--output", "a\0b"],
        ["export", "FOLDER", "--trial", "1", "-o", "w" * 251 + ".yaml"],
        ["front", "FOLDER", "--plot", "/proc/x.png"],
        ["sensitivity", "STUDY", "-o", "y" * 300],
        ["check", "x" * 300],
        ["evaluate", "x" * 300],
        ["freeze", "x" * 300],
    ],
    ids=lambda arguments: f"{arguments[0]}-{arguments[-1][:6]}",
)
def test_a_path_that_cannot_be_is_exit_code_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.yaml").write_text(f"{STUDY}workers: {{kind: serial}}\n")
    names = {"STUDY": str(tmp_path / "study.yaml"), "FOLDER": str(tmp_path)}
    assert main([names.get(one, one) for one in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prunesearch: ") and "Traceback" not in error


def test_a_search_whose_folder_is_a_file_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    assert main(["run", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "study.yaml")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_sensitivity_knows_its_format_before_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    assert main(["sensitivity", str(tmp_path / "study.yaml"), "--plot", str(tmp_path / "a.bmp")]) == 2
    assert "its suffix says no format" in capsys.readouterr().err


def ending(monkeypatch: pytest.MonkeyPatch, verb: str, error: OSError) -> int:
    def fail(parsed: object) -> int:
        raise error

    monkeypatch.setattr(cli, f"_{verb}", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    return main([verb, "x"])


@pytest.mark.parametrize("verb", ["run", "resume", "confirm"])
def test_a_search_that_lost_its_reader_says_so(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(monkeypatch, verb, BrokenPipeError()) == 1
    assert "run it again" in capsys.readouterr().err


def test_a_list_that_is_cut_off_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(monkeypatch, "status", BrokenPipeError()) == 0
    assert capsys.readouterr().err == ""


def test_a_full_disk_under_the_output_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(monkeypatch, "status", OSError(errno.ENOSPC, "No space left on device")) == 1
    assert "output: No space left on device" in capsys.readouterr().err
    with pytest.raises(OSError, match="odd"):
        ending(monkeypatch, "status", OSError(errno.EINVAL, "odd"))
