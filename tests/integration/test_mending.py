"""A wrong path may be corrected until an evaluation is complete; afterwards it may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fake_search
import pytest
from fake_search import study
from test_study import RECORD

from prunesearch.config import DataConfig, ModelConfig, StudyConfig
from prunesearch.errors import RunError, StudyError
from prunesearch.evaluate import Inputs
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.search.driver import run_study
from prunesearch.study.differences import MAY_MEND
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.storage import storage_url
from prunesearch.study.store import open_store

NAME = "vit_digits_patch1_8"
WRONG = study(4)
MENDED: dict[str, StudyConfig] = {
    "model.checkpoint": replace(WRONG, model=ModelConfig(NAME, checkpoint="right.safetensors")),
    "model.pretrained": replace(WRONG, model=ModelConfig(NAME, pretrained=True)),
    "model.num_classes": replace(WRONG, model=ModelConfig(NAME, num_classes=10)),
    "data.name": replace(WRONG, data=DataConfig("folder", root=".")),
    "data.train_split": replace(WRONG, data=DataConfig(train_split="training")),
    "data.val_split": replace(WRONG, data=DataConfig(val_split="val")),
}


def evaluate(task: Task) -> Evaluation:
    """Fail with the wrong settings."""
    if (task.model, task.data) == (WRONG.model, WRONG.data):
        raise FileNotFoundError("wrong.safetensors")
    return fake_search.evaluate(task)


def test_every_setting_that_may_be_mended_is_tested() -> None:
    assert MENDED.keys() == set(MAY_MEND)


@pytest.mark.parametrize(("field", "several"), [*((field, False) for field in MENDED), ("model.num_classes", True)])
def test_a_correction_before_the_first_result_starts_the_search_over(
    tmp_path: Path, field: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunesearch.evaluate.inputs.check_inputs", lambda *config, **how: Inputs())
    storage = storage_url(tmp_path) if several else None
    with pytest.raises(RunError, match=r"wrong.safetensors"):
        run_study(WRONG, tmp_path, storage=storage, evaluate="test_mending:evaluate")
    assert [record.state for record in open_study_readonly(tmp_path).records()] == ["failed"]
    done = run_study(MENDED[field], tmp_path, storage=storage, evaluate="test_mending:evaluate")
    assert (done.reason, done.complete, done.failed) == ("trials", 4, 0)
    records = open_study_readonly(tmp_path).records()
    assert [(record.origin, record.state) for record in records[:1]] == [("dense", "complete")]  # it runs again
    assert open_study_readonly(tmp_path).config == MENDED[field]
    with pytest.raises(StudyError, match=rf"exists with other settings:\n  - {field}: "):
        run_study(WRONG, tmp_path, storage=storage, evaluate="test_mending:evaluate")
    again = run_study(MENDED[field], tmp_path, storage=storage, evaluate="test_mending:evaluate")
    assert again.complete == 4


def test_it_is_the_same_search_as_one_that_was_right_from_the_start(tmp_path: Path) -> None:
    right = MENDED["model.num_classes"]
    with pytest.raises(RunError):
        run_study(WRONG, tmp_path / "a", evaluate="test_mending:evaluate")
    for name in ("a", "b"):
        run_study(right, tmp_path / name, evaluate="test_mending:evaluate")
    readers = (open_study_readonly(tmp_path / name) for name in ("a", "b"))
    found, expected = ([(one.uid, one.evaluations) for one in reader.records()] for reader in readers)
    assert found == expected


def test_a_driver_that_runs_candidates_keeps_others_from_correcting(tmp_path: Path) -> None:
    url, right = storage_url(tmp_path), MENDED["model.num_classes"]
    store = open_store(WRONG, url, owner="one", alone=False)
    store.begin(RECORD, {})
    with pytest.raises(StudyError, match="other settings"):
        open_store(right, url, owner="two", alone=False)
    store.close()
    open_store(right, url).close()  # a driver that is alone: the running one was cut short
    assert open_study_readonly(tmp_path).records() == []
