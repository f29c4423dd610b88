"""Export: the schedule file, the weights, and the same metrics in a new process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from prunesearch.config import Budget, FinetuneConfig, ModelConfig, SpaceConfig, StudyConfig, WorkersConfig
from prunesearch.errors import FileError, StudyError, UserError
from prunesearch.evaluate import evaluate
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.predict import predict
from prunesearch.export.schedules import export, measure_again
from prunesearch.files import load_schedule, load_schedule_file, save_schedule
from prunesearch.models import apply_schedule
from prunesearch.record import Record
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.tasks import candidate_task

SCHEDULE = Schedule((Stage(1, keep=0.5, reduce="squeeze"), Stage(3, keep=0.7, reduce="merge")))
STUDY = StudyConfig(
    version=1,
    name="small",
    model=ModelConfig("vit_digits_patch1_8", pretrained=True),
    space=SpaceConfig(blocks=(1, 3)),
    finetune=FinetuneConfig(learning_rate=1e-3, batch_size=50),
    rungs=(Budget(images=100),),
    workers=WorkersConfig(kind="serial"),
)


def finished(folder: Path, images: int = 100) -> Record:
    """A study with a candidate that was really fine-tuned and measured."""
    record = Record(7, "abc", SCHEDULE, "complete", "sampler", seed=3)
    task = candidate_task(record, STUDY, Budget(images=images))
    evaluation = evaluate(replace(task, save_to=str(folder / "weights" / "abc") if images else None))
    assert evaluation.status == "complete", evaluation.traceback
    return replace(record, evaluations=(evaluation,))


def test_the_exported_file_reproduces_the_measured_top1(tmp_path: Path) -> None:
    record = finished(tmp_path)
    written = export(record, STUDY, tmp_path / "out" / "best.yaml", weights=True)
    assert [path.name for path in written] == ["best.yaml", "best.safetensors"]
    assert load_schedule(written[0]) == SCHEDULE
    file = load_schedule_file(written[0])
    assert file.measured["finetuned_images"] == 100 and file.made_by["trial"] == 7
    assert file.measured["tokens"] == list(record.evaluation.tokens)
    # as a user would, with timm and three lines
    model = timm.create_model("vit_digits_patch1_8")
    apply_schedule(model, load_schedule(written[0]))
    model.load_state_dict(load_file(written[1]))
    logits, labels, _ = predict(model, open_data(STUDY.data, model)[1], 128, torch.device("cpu"), amp=False)
    assert 100 * (logits.argmax(1) == labels).double().mean().item() == record.evaluation.value("top1")
    # and as `prunesearch evaluate` does, from the file alone
    _, pruned = measure_again(file, written[0].parent, metrics=("top1", "gmacs"))
    assert dict(pruned.metrics) == dict(record.evaluation.metrics)


def test_weights_that_are_gone_are_made_again_and_announced(tmp_path: Path) -> None:
    record = finished(tmp_path)
    before = load_file(tmp_path / "weights" / "abc.safetensors")
    for path in (tmp_path / "weights").iterdir():
        path.unlink()
    said: list[str] = []
    _, weights = export(record, STUDY, tmp_path / "best.yaml", weights=True, say=said.append)
    assert len(said) == 1 and "fine-tuning again" in said[0]
    again = load_file(weights)
    assert all(torch.equal(again[name], value) for name, value in before.items())
    assert sorted(path.name for path in tmp_path.glob("best*")) == ["best.safetensors", "best.yaml"]


def test_weights_of_several_rungs_are_made_again_rung_by_rung(tmp_path: Path) -> None:
    first = finished(tmp_path, 50)
    stem = str(tmp_path / "weights" / "abc.1")
    task = replace(
        candidate_task(first, STUDY, Budget(images=150)), resume_from=first.evaluation.checkpoint, save_to=stem
    )
    as_it_comes = finished(tmp_path, 0).evaluation
    record = replace(first, evaluations=(as_it_comes, first.evaluation, evaluate(task)))
    kept = load_file(f"{stem}.safetensors")
    for path in (tmp_path / "weights").iterdir():
        path.unlink()
    said: list[str] = []
    written = export(record, STUDY, tmp_path / "best.yaml", weights=True, say=said.append)
    assert len(said) == 1 and "fine-tuning again" in said[0]
    again = load_file(written[1])
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_what_a_schedule_learned_always_comes_along(tmp_path: Path) -> None:
    schedule = Schedule((Stage(1, at="pre", score="predictor", keep=0.6),))
    record = replace(Record(7, "abc", SCHEDULE, "complete", "sampler", seed=3), schedule=schedule)
    untrained = replace(record, evaluations=(evaluate(candidate_task(record, STUDY, Budget(images=0))),))
    with pytest.raises(StudyError, match="learns scores or queries, but it was measured without training"):
        export(untrained, STUDY, tmp_path / "best.yaml")
    task = replace(candidate_task(record, STUDY, Budget(images=50)), save_to=str(tmp_path / "w"))
    trained = replace(record, evaluations=(evaluate(task),))
    assert [path.name for path in export(trained, STUDY, tmp_path / "best.yaml")] == ["best.yaml", "best.safetensors"]
    assert any(name.startswith("token_stages.") for name in load_file(tmp_path / "best.safetensors"))


def test_what_cannot_be_exported_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"trial 7: it is running"):
        export(Record(7, "abc", SCHEDULE, "running", "sampler", 0), STUDY, tmp_path / "best.yaml")
    as_it_comes = finished(tmp_path, images=0)
    with pytest.raises(StudyError, match="Leave --weights out"):
        export(as_it_comes, STUDY, tmp_path / "best.yaml", weights=True)
    assert not (tmp_path / "best.yaml").exists()
    with pytest.raises(UserError, match="YAML holds printable characters only"):
        export(finished(tmp_path), STUDY, tmp_path / os.fsdecode(b"e\xff.yaml"), weights=True)
    assert export(as_it_comes, STUDY, tmp_path / "best.yaml") == [tmp_path / "best.yaml"]


def test_a_schedule_without_a_model_asks_for_one(tmp_path: Path) -> None:
    save_schedule(SCHEDULE, tmp_path / "mine.yaml")
    file = load_schedule_file(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="names no model"):
        measure_again(file, tmp_path)
    dense, pruned = measure_again(file, tmp_path, study=STUDY, metrics=("gmacs",))
    assert pruned.value("gmacs") < dense.value("gmacs")
    (tmp_path / "odd.yaml").write_text("version: 1\nstages: []\nmodel: {nam: x}\n")
    with pytest.raises(FileError, match="nam"):
        measure_again(load_schedule_file(tmp_path / "odd.yaml"), tmp_path)
