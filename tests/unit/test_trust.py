"""The claims of docs/trust.md: files from strangers are data, and no code in them runs."""

from __future__ import annotations

import ast
import contextlib
import inspect
import pickle
import re
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import timm
import torch
from optuna.storages._rdb import models
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.storages.journal._base import BaseJournalSnapshot

from prunesearch.config import Budget, DataConfig, FinetuneConfig, ModelConfig
from prunesearch.errors import FileError, ModelError, StudyError
from prunesearch.evaluate import Task, build_model, evaluate
from prunesearch.files import load_schedule, load_study
from prunesearch.models import apply_schedule
from prunesearch.schedule import Schedule, Stage
from prunesearch.study.storage import open_storage

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "prunesearch").rglob("*.py"))
SMALL = ModelConfig("vit_digits_patch1_8", options=(("depth", 2),))


class Bomb:
    """A malicious pickle: it runs code when it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (_explode, (str(self.place),))


def _explode(place: str) -> dict[str, object]:
    Path(place).touch()
    return {}


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    """A pickle file that creates `exploded` in its folder when it is loaded."""
    path = tmp_path / "bomb.pth"
    torch.save(Bomb(tmp_path / "exploded"), path)
    torch.load(path, weights_only=False)
    (tmp_path / "exploded").unlink()  # it works
    return path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "prunesearch")))
def test_files_from_others_are_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if names == ["PicklingError", "pickle"]:  # raised when something cannot be sent to a process
                continue
            unsafe = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
            assert not unsafe & {name.split(".")[0] for name in names}, names
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
        assert called not in ("eval", "exec", "compile", "__import__", "os.system")
        assert not called.startswith(("subprocess.", "pickle."))
        if called in ("torch.load", "load_state_dict"):
            assert given.get("weights_only") == "True", f"{called}, line {node.lineno}"
        if called.startswith("yaml."):
            assert called in ("yaml.load", "yaml.compose", "yaml.dump"), called
            assert given.get("Loader", given.get("Dumper")) in ("_Loader", "Dumper", "_RowDumper")
        if called in ("np.load", "numpy.load"):
            assert given.get("allow_pickle", "False") == "False"
        if called.endswith("import_module"):
            homes = ("prunesearch/plugins.py", "prunesearch/registry.py", "prunesearch/workers/protocol.py")
            assert str(path.relative_to(ROOT)) in homes


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    for text in (
        "version: 1\nstages: !!python/object/apply:os.system ['touch exploded']\n",
        f"version: 1\nstages: []\nmade_by: {{x: !!python/object/apply:pathlib.Path.touch [{tmp_path}/exploded]}}\n",
    ):
        (tmp_path / "a.yaml").write_text(text)
        for load in (load_schedule, load_study):
            with contextlib.suppress(FileError):  # or it loads: the tag is ignored
                load(tmp_path / "a.yaml")
    assert not (tmp_path / "exploded").exists()


def test_weights_are_tensors_or_refused(bomb: Path, tmp_path: Path) -> None:
    disguised = tmp_path / "a.safetensors"
    disguised.write_bytes(bomb.read_bytes())
    for path in (bomb, disguised):
        with pytest.raises(ModelError, match="cannot be read"):
            build_model(replace(SMALL, checkpoint=str(path)))
        with pytest.raises(ModelError, match="cannot be read"):
            apply_schedule(build_model(SMALL), Schedule((Stage(1, keep=0.5),)), weights=path)
    with pytest.raises(ModelError, match=r"checkpoint_path: .*weights are named by model\.checkpoint"):
        build_model(replace(SMALL, options=(*SMALL.options, ("checkpoint_path", str(bomb)))))
    assert not (tmp_path / "exploded").exists()


def test_a_schedule_file_that_names_a_bomb_is_refused(bomb: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 1\nstages: [{block: 1, keep: 0.5}]\nweights: bomb.pth\n")
    with pytest.raises(ModelError, match="cannot be read"):
        apply_schedule(build_model(SMALL), tmp_path / "a.yaml")
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_to_continue_from_is_tensors_or_a_failure(bomb: Path, tmp_path: Path) -> None:
    task = Task(
        uid="a",
        model=SMALL,
        data=DataConfig("digits", train_images=10, val_images=10),
        schedule=Schedule((Stage(1, keep=0.5),)),
        budget=Budget(images=10),
        finetune=FinetuneConfig(batch_size=5, distill=False),
        save_to=str(tmp_path / "first"),
    )
    assert evaluate(task).status == "complete"
    (tmp_path / "first.state").write_bytes(bomb.read_bytes())
    again = replace(task, budget=Budget(images=20), resume_from=task.save_to, save_to=None)
    assert evaluate(again).status == "failed"
    assert not (tmp_path / "exploded").exists()


def test_optuna_keeps_json() -> None:
    """Its databases have no pickle columns. Its journals use snapshots, which are pickles, for Redis only."""
    types = {type(column.type) for table in models.BaseModel.metadata.tables.values() for column in table.columns}
    assert types and not any(issubclass(kind, sqlalchemy.PickleType | sqlalchemy.LargeBinary) for kind in types)
    assert "pickle" not in inspect.getsource(optuna.storages._rdb.storage)
    assert issubclass(JournalFileBackend, BaseJournalBackend)
    assert not issubclass(JournalFileBackend, BaseJournalSnapshot)


def test_no_storage_but_databases_and_journal_files_can_be_opened(tmp_path: Path) -> None:
    for url in ("redis://localhost:1/0", "journal+redis://localhost:1", "grpc://localhost:1"):
        with pytest.raises(StudyError, match="cannot be opened"):
            open_storage(url, writing=True)
    (tmp_path / "a.log").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with contextlib.suppress(Exception):  # it is no journal
        open_storage(f"journal:{tmp_path / 'a.log'}", writing=True).get_all_studies()
    assert not (tmp_path / "exploded").exists()


def test_the_page_names_files_and_verbs_that_are_there() -> None:
    text = (ROOT / "docs" / "trust.md").read_text()
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
    assert timm.create_model is not None and "weights_only" in text
