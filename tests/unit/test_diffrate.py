"""Import of DiffRate's file as a schedule, and its possible mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_schedule import shape

from prunesearch.cli import main
from prunesearch.errors import FileError
from prunesearch.files import load_schedule_file
from prunesearch.presets import load_preset
from prunesearch.presets.diffrate import load_diffrate

PRUNE = "[197,196,190,168,150,139,129,117,99,78,58,3]"
MERGE = "[197,194,176,156,141,133,121,107,88,64,56,3]"


def written(folder: Path, prune: object = PRUNE, merge: object = MERGE, model: str = "ViT-S-DeiT") -> Path:
    path = folder / "compression_rate.json"
    path.write_text(json.dumps({model: {"2.9": {"prune_kept_num": prune, "merge_kept_num": merge}}}))
    return path


def test_the_file_gives_the_preset(tmp_path: Path) -> None:
    assert load_diffrate(written(tmp_path), "ViT-S-DeiT", "2.9") == load_preset("diffrate-s-2.9", shape())


def test_counts_lose_the_class_token_and_only_fall(tmp_path: Path) -> None:
    path = written(tmp_path, "[65, 60, 62]", "[65, 50, 40]", model="mine")
    found = [(stage.block, stage.reduce, stage.tokens) for stage in load_diffrate(path, "mine", "2.9").stages]
    assert found == [(1, "drop", 59), (1, "absorb", 49), (2, "absorb", 39)]


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"prune": "None"}, "a model that only merges (CAFormer) is not supported"),
        ({"prune": None}, "prune_kept_num is None: "),
        ({"merge": "[197, 3]"}, "merge_kept_num has 2 entries, but there are 12 blocks"),
        ({"merge": MERGE.replace("107", "10.7")}, "possible: a list of whole numbers from 2"),
        ({"merge": MERGE.replace("107", "1")}, "possible: a list of whole numbers from 2"),
        ({"merge": "[]"}, "possible: a list of whole numbers from 2"),
        ({"merge": "197, 3"}, "possible: a list of whole numbers from 2"),
        ({"merge": 197}, "possible: a list of whole numbers from 2"),
    ],
)
def test_wrong_lists(tmp_path: Path, lists: dict[str, object], said: str) -> None:
    with pytest.raises(FileError) as caught:
        load_diffrate(written(tmp_path, **lists), "ViT-S-DeiT", "2.9")
    assert said in str(caught.value) and "ViT-S-DeiT 2.9: " in str(caught.value)


def test_both_lists_are_reported(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="2 mistakes"):
        load_diffrate(written(tmp_path, "[197]", "[197]"), "ViT-S-DeiT", "2.9")


@pytest.mark.parametrize("content", ["[]", "3", '{"ViT-S-DeiT": 3}', '{"ViT-S-DeiT": {"2.9": []}}'])
def test_other_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(FileError, match="is not of DiffRate's form"):
        load_diffrate(tmp_path / "other.json", "ViT-S-DeiT", "2.9")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model", "ViT-S"], "unknown model 'ViT-S'. Known: ViT-S-DeiT. Did you mean"),
        (["--target", "3.5"], "unknown target of ViT-S-DeiT '3.5'. Known: 2.9."),
    ],
)
def test_unknown_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str) -> None:
    given = ["import-diffrate", str(written(tmp_path)), "--model", "ViT-S-DeiT", "--target", "2.9"]
    assert main([*given, *change]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"), [(None, "there is no such file"), (b"{", "is not JSON"), (b"\xff", "UTF-8")]
)
def test_no_file_and_no_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["import-diffrate", str(path), "--model", "ViT-S-DeiT", "--target", "2.9"]) == 2
    assert said in capsys.readouterr().err


def test_the_verb_writes_a_schedule_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["import-diffrate", str(written(tmp_path)), "--model", "ViT-S-DeiT", "--target", "2.9"]
    assert main(given) == 0
    assert "21 stages -> diffrate-vit-s-deit-2.9.yaml" in capsys.readouterr().out
    assert main([*given, "-o", "mine.yaml"]) == 0
    file = load_schedule_file("mine.yaml")
    assert file.schedule == load_preset("diffrate-s-2.9", shape())
    assert file.made_by == {"diffrate": "compression_rate.json", "model": "ViT-S-DeiT", "target": "2.9"}
    assert file == load_schedule_file("diffrate-vit-s-deit-2.9.yaml")
