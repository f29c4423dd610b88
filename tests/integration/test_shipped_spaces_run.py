"""Shipped studies of tasks beside classification, run to their end with a handful of candidates."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from prunesearch.evaluate.digits import load_digits
from prunesearch.export.schedules import export
from prunesearch.files import load_study
from prunesearch.search.driver import run_study
from prunesearch.study.reader import open_study_readonly

SPACES = Path(__file__).parents[2] / "search_spaces"
FEW = ["stop.trials=6", "workers={kind: serial}", "confirm.speed_seconds=0"]


def run(name: str, folder: Path, changes: list[str]) -> list[float]:
    """The first objective of each candidate that ran on the last rung."""
    config = load_study(SPACES / f"{name}.yaml", [*FEW, *changes])
    run_study(config, folder)
    reader = open_study_readonly(folder)
    records = reader.records()
    assert len(records) == 6 and all(record.state in ("complete", "paused") for record in records), [
        record.outcome for record in records
    ]
    trained = [record for record in records if record.evaluation is not None and record.evaluation.images > 0]
    (pruned, *_) = [record for record in trained if record.schedule.stages]
    export(pruned, reader.config, folder / "best.yaml", weights=True, vocabulary=reader.vocabulary)
    reader.close()
    return [record.evaluation.value(config.objectives[0].metric) for record in trained if record.evaluation]


@pytest.mark.slow
def test_segmentation_digits(tmp_path: Path) -> None:
    changes = ["data.train_images=64", "data.val_images=24", "rungs=[{images: 0}, {images: 64}]"]
    found = run("segmentation_digits", tmp_path / "study", changes)
    assert len(found) >= 2 and max(found) > 40  # the shipped model was trained


@pytest.mark.slow
def test_features_without_labels(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, digit in enumerate(load_digits("train")[0][:50]):
        Image.fromarray(digit.numpy()).save(pictures / f"{index}.png")
    model = (
        "model={name: vit_small_patch14_dinov2.lvd142m, image_size: 56, "
        "options: {depth: 10, embed_dim: 24, num_heads: 2}}"
    )
    changes = [model, f"data={{name: images, root: {pictures}}}", "rungs=[{images: 0}, {images: 32}]"]
    found = run("features_without_labels", tmp_path / "study", changes)
    assert len(found) >= 2 and all(0 < value <= 100 for value in found)
