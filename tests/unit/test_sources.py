"""Flags and a file: a flag replaces one value; only another name starts a new section."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prunesearch.cli import main
from prunesearch.config import DataConfig, ModelConfig, SpaceConfig, StudyConfig
from prunesearch.errors import FileError, UserError
from prunesearch.export.sources import Given, guessed_normalisation, model_and_data
from prunesearch.files import load_schedule_file, override_study, save_schedule, to_mapping
from prunesearch.schedule import Schedule, Stage

MODEL = ModelConfig("vit_digits_patch1_8", checkpoint="mine.safetensors", image_size=8, num_classes=10)
DATA = DataConfig(
    "folder",
    root="/old/train",
    val_root="/old/val",
    train_images=100,
    val_images=50,
    mean=(0.3,),
    std=(0.2,),
    interpolation="bilinear",
    crop_pct=0.8,
    in_memory=False,
    loaders=1,
)
STUDY = StudyConfig(version=1, name="s", model=MODEL, data=DATA, space=SpaceConfig(blocks=(1,)))
FLAGS = {
    "nothing": (Given(), MODEL, DATA),
    "same data": (Given(data="folder"), MODEL, DATA),
    "same model": (Given(model=MODEL.name), MODEL, DATA),
    "root": (Given(root="/new"), MODEL, replace(DATA, root="/new")),
    "root of the same data": (Given(data="folder", root="/new"), MODEL, replace(DATA, root="/new")),
    "both roots": (
        Given(data="folder", root="/new", val_root="/new/val"),
        MODEL,
        replace(DATA, root="/new", val_root="/new/val"),
    ),
    "other data": (Given(data="digits"), MODEL, DataConfig("digits")),
    "other data with a root": (Given(data="torch/x", root="/new"), MODEL, DataConfig("torch/x", root="/new")),
    "other model": (Given(model="deit_tiny_patch16_224"), ModelConfig("deit_tiny_patch16_224", pretrained=True), DATA),
    "one field": (Given(overrides=("data.crop_pct=0.5",)), MODEL, replace(DATA, crop_pct=0.5)),
    "one field of each": (
        Given(overrides=("data.mean=[0.1]", "model.image_size=16")),
        replace(MODEL, image_size=16),
        replace(DATA, mean=(0.1,)),
    ),
    "a field taken away": (Given(overrides=("data.mean=null",)), MODEL, replace(DATA, mean=None)),
    "a path that looks like a number": (Given(root="007"), MODEL, replace(DATA, root="007")),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "best.yaml"
    save_schedule(Schedule((Stage(1, keep=0.5),)), path, model=to_mapping(MODEL), data=to_mapping(DATA))
    return path


@pytest.mark.parametrize("source", ["file", "study"])
@pytest.mark.parametrize("flags", FLAGS)
def test_a_flag_replaces_one_value(flags: str, source: str, file: Path) -> None:
    given, model, data = FLAGS[flags]
    study = STUDY if source == "study" else None
    assert model_and_data(load_schedule_file(file), study, given) == (model, data)


@pytest.mark.parametrize("field", [name for name in to_mapping(DATA) if name != "name"])
def test_set_replaces_one_value_of_a_study(field: str) -> None:
    """For resume, confirm and import-tune."""
    changed = override_study(STUDY, [f"data.{field}={json.dumps(to_mapping(DATA)[field])}"])
    assert changed == STUDY
    assert override_study(STUDY, ["stop.trials=3"]).data == DATA


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Given(root="/new"), "data: values were given for it, but no name"),
        (Given(overrides=("data.mean=[0.1]",)), "--data NAME"),
        (Given(overrides=("model.image_size=8",)), "--model NAME"),
        (Given(overrides=("stop.trials=3",)), "model.FIELD=VALUE"),
        (Given(overrides=("data=digits",)), "model.FIELD=VALUE"),
    ],
)
def test_values_without_a_section_ask_for_it(given: Given, said: str, tmp_path: Path) -> None:
    save_schedule(Schedule((Stage(1, keep=0.5),)), tmp_path / "bare.yaml")
    with pytest.raises(UserError, match=said):
        model_and_data(load_schedule_file(tmp_path / "bare.yaml"), None, given)


def test_a_field_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(FileError, match=r'crop_pkt: unknown field.*Did you mean "crop_pct"'):
        model_and_data(load_schedule_file(file), None, Given(overrides=("data.crop_pkt=1",)))


def test_guessed_normalisation_is_said_with_both_values(file: Path) -> None:
    model = replace(MODEL, checkpoint=None)
    before = (model, DATA)
    same = (model, replace(DATA, root="/elsewhere"))
    assert guessed_normalisation(before, same) == []
    said = guessed_normalisation(before, (model, DataConfig("digits")))
    assert [text.split()[0] for text in said] == ["data.mean", "data.std", "data.interpolation", "data.crop_pct"]
    assert "measured with [0.3]" in said[0] and "is [0.305]" in said[0] and "--set data.mean=" in said[0]
    assert guessed_normalisation(before, (model, replace(DataConfig("digits"), mean=(0.5,), std=(0.2,)))) == said[2:]
    unset = (model, DataConfig("folder", root="/old"))
    assert guessed_normalisation(unset, (model, DataConfig("digits"))) == []


def test_evaluate_and_freeze_say_what_they_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"name": "vit_digits_patch1_8", "options": {"depth": 2}}
    data = {"name": "torch/mnist", "mean": [0.9], "std": [0.1]}
    save_schedule(Schedule((Stage(1, threshold=0.01),)), tmp_path / "a.yaml", model=small, data=data)
    few = ["--data", "digits", "--set", "data.train_images=20", "--set", "data.val_images=20"]
    assert main(["evaluate", str(tmp_path / "a.yaml"), "--metric", "top1", *few]) == 0
    said = capsys.readouterr().err
    assert "note: data.mean is [0.305]" in said and "measured with [0.9]" in said
    frozen = tmp_path / "frozen.yaml"
    assert main(["freeze", str(tmp_path / "a.yaml"), "-o", str(frozen), *few, "--set", "data.std=[0.1]"]) == 0
    said = capsys.readouterr().err
    assert "note: data.mean" in said and "data.std" not in said
    assert load_schedule_file(frozen).data == {"name": "digits", "train_images": 20, "val_images": 20, "std": [0.1]}


def test_check_keeps_what_belongs_to_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"name": "vit_digits_patch1_8", "options": {"depth": 2}}
    save_schedule(Schedule((Stage(1, keep=0.5),)), tmp_path / "a.yaml", model=small)
    costs = []
    for flags in ([], ["--model", "vit_digits_patch1_8"], ["--set", "model.options.depth=3"]):
        assert main(["check", str(tmp_path / "a.yaml"), *flags]) == 0
        costs.append(capsys.readouterr().out.splitlines()[1])
    assert costs[0] == costs[1] != costs[2]
