"""Dense siblings with real models: what is measured of them, and every command on a study with some."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import fake_sizes

from prunesearch.cli import main
from prunesearch.config import (
    Budget,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    SpaceConfig,
    StopConfig,
    StudyConfig,
    SupernetConfig,
    WorkersConfig,
)
from prunesearch.evaluate import Evaluation, Task, build_model, evaluate
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.predict import predict
from prunesearch.schedule import Schedule
from prunesearch.search.driver import run_study
from prunesearch.study.reader import open_study_readonly

DATA = DataConfig(train_images=40, val_images=80)
STUDY = """
version: 1
name: sizes
model: {name: vit_small_toy_8.v1_digits, pretrained: true}
siblings: [auto, {name: vit_tiny_toy_8, checkpoint: other.safetensors}, vit_tiny_toy_8.digits]
data: {train_images: 40, val_images: 80}
space: {blocks: [0, 1], keep: [0.5, 1.0]}
metrics: [agreement, loss]
workers: {kind: serial}
stop: {trials: 3}
"""


def toy(folder: Path, name: str, seed: int) -> ModelConfig:
    path = fake_sizes.save(name, folder / f"{name}.{seed}.safetensors", seed)
    return ModelConfig(name, checkpoint=str(path), num_classes=10, options=(("in_chans", 1), ("img_size", 8)))


def test_a_sibling_is_measured_as_itself_and_agrees_with_the_model_of_the_study(tmp_path: Path) -> None:
    small, tiny = toy(tmp_path, "vit_small_toy_8", 1), toy(tmp_path, "vit_tiny_toy_8", 2)
    metrics = ("top1", "loss", "gmacs", "parameters", "agreement")
    task = Task("a", small, DATA, Schedule(), Budget(images=0), metrics, sibling=tiny)
    found, alone = evaluate(task), evaluate(replace(task, model=tiny, sibling=None))
    values, own = dict(found.metrics), dict(alone.metrics)
    assert found.status == "complete" and found.tokens == alone.tokens == (17, 17) and own["agreement"] == 100
    assert {name: values[name] for name in metrics[:4]} == {name: own[name] for name in metrics[:4]}
    guesses = []
    for config in (small, tiny):
        model = build_model(config)
        guesses.append(predict(model, open_data(DATA, model)[1], 128, next(model.parameters()).device, False).logits)
    same = (guesses[0].argmax(dim=1) == guesses[1].argmax(dim=1)).double().mean().item()
    assert values["agreement"] == pytest.approx(100 * same) and same < 1


@pytest.fixture
def weights() -> Iterator[Path]:
    """The folder in which timm finds the weights of the toys."""
    fake_sizes.WEIGHTS.mkdir()
    yield fake_sizes.WEIGHTS
    shutil.rmtree(fake_sizes.WEIGHTS)


def test_every_command_on_a_study_with_siblings(
    tmp_path: Path,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """auto finds weights that are there, a checkpoint is taken, and one without weights does not end the search."""
    for seed, name in enumerate(["vit_small_toy_8", "vit_tiny_toy_8"]):
        fake_sizes.save(name, weights / f"{name}.v1_digits.safetensors", seed)
    fake_sizes.save("vit_tiny_toy_8", tmp_path / "other.safetensors", 7)
    study, output = tmp_path / "sizes.yaml", ["--output", str(tmp_path / "outputs")]
    study.write_text(STUDY)
    monkeypatch.chdir(tmp_path)

    def look(*arguments: str) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    checked = look("check", str(study))
    assert checked.count("dense sibling vit_tiny_toy_8") == 3 and checked.count("0.00018619 GMACs") == 3
    said = look("run", str(study), *output)
    assert "dense sibling 1 of 3: vit_tiny_toy_8.v1_digits top1" in said
    assert "dense sibling 2 of 3: vit_tiny_toy_8 (other) top1" in said and "3/3" in said
    assert "dense sibling vit_tiny_toy_8.digits: not measured (error)" in caplog.text
    folder = str(tmp_path / "outputs" / "sizes")
    siblings = [row for row in json.loads(look("front", folder, "--json")) if "sibling" in row]
    assert [row["origin"] for row in siblings] == [
        "dense sibling: vit_tiny_toy_8.v1_digits",
        "dense sibling: vit_tiny_toy_8 (other)",
    ]
    assert siblings[0]["metrics"]["loss"] != siblings[1]["metrics"]["loss"]
    assert all(row["metrics"]["agreement"] < 100 and row["tokens"] == [17, 17] for row in siblings)
    assert "2 of 3 measured" in look("status", folder)
    assert "vit_tiny_toy_8 (other)" in look("front", folder, "--plot", str(tmp_path / "front.png"))
    look("export", folder, "-o", str(tmp_path / "best.yaml"))
    fake_sizes.save("vit_tiny_toy_8", weights / "vit_tiny_toy_8.digits.safetensors", 9)
    caplog.clear()
    said = look("resume", folder, *output)
    assert said.count("dense sibling") == 1 and "dense sibling 3 of 3: vit_tiny_toy_8.digits top1" in said
    assert "not measured" not in caplog.text and "3 of 3 measured" in look("status", folder)


def test_siblings_do_not_start_from_shared_weights(tmp_path: Path) -> None:
    small, tiny = toy(tmp_path, "vit_small_toy_8", 1), toy(tmp_path, "vit_tiny_toy_8", 2)
    config = StudyConfig(
        version=1,
        name="shared",
        model=small,
        space=SpaceConfig(blocks=(0, 1), keep=(0.5, 1.0)),
        data=DATA,
        finetune=FinetuneConfig(batch_size=20),
        evaluation="supernet",
        supernet=SupernetConfig(images=20, schedules=1),
        workers=WorkersConfig(kind="serial"),
        stop=StopConfig(trials=2),
        siblings=(tiny,),
    )
    run_study(config, tmp_path / "study")
    reader = open_study_readonly(tmp_path / "study")
    (sibling,), records = reader.siblings(), reader.records()
    reader.close()
    plain = evaluate(Task("a", tiny, DATA, Schedule(), Budget(images=0), ("top1",)))
    assert isinstance(sibling.evaluation, Evaluation) and sibling.evaluation.start is None and len(records) == 2
    assert sibling.evaluation.value("top1") == plain.value("top1")
