"""Imports of the package and its commands: reading needs no PyTorch, a deployed model only torch, timm and yaml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fake_search
import pytest

from prunesearch.config import Limit
from prunesearch.evaluate import shape_cache
from prunesearch.report.catalogue import CATALOGUES

HEAVY = {"torch", "timm", "torchvision", "ray", "sklearn", "scipy", "matplotlib"}
SCHEDULE = """
version: 1
model: {name: deit_small_patch16_224}
stages: [{block: 3, keep: 0.7}, {block: 6, keep: 0.7, reduce: squeeze}]
"""
STUDY = """\
# What a light look costs.
version: 1
name: light
model: {name: deit_small_patch16_224.fb_in1k, pretrained: true}
data: {name: folder, root: nowhere}
space: {blocks: [3, 6, 9], keep: [0.5, 0.7, 1.0], reduce: [drop, merge], start_from: [evit-0.7, sensitivity]}
limits: {gmacs: {at_most: 76%}, top1: {drop_at_most: 1.0}}
stop: {trials: 5}
"""


def run(code: str, **environment: str) -> str:
    process = [sys.executable, "-c", code]
    result = subprocess.run(process, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study with a dense sibling, a study file and a schedule file."""
    folder = tmp_path_factory.mktemp("light")
    limits = (("gmacs", Limit(at_most="100%")), ("top1", Limit(drop_at_most=90.0)))
    config = fake_search.study(4, limits=limits, siblings=("vit_digits_patch1_8",))
    fake_search.run(config, folder / "study", journal=False)
    (folder / "search_spaces").mkdir()
    (folder / "search_spaces" / "light.yaml").write_text(STUDY)
    (folder / "best.yaml").write_text(SCHEDULE)
    return folder


def test_importing_the_package_loads_nothing_at_all() -> None:
    heavy = HEAVY | {"optuna", "rich", "numpy", "yaml"}
    assert run(f"import sys, prunesearch; print({heavy} & set(sys.modules))") == "set()"
    heavy = HEAVY | {"optuna", "rich", "numpy"}
    assert run(f"import sys, prunesearch.cli; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.parametrize(
    "verb",
    [
        "status study",
        "front study",
        "front study --csv",
        "front study --within top1=90",
        "export study -o exported.yaml",
        "export study --fastest-within top1=90 --at-most gmacs=100% -o exported.yaml",
        "check search_spaces/light.yaml",
        "check best.yaml",
        "schema",
        *(f"list {what}" for what in CATALOGUES),
    ],
)
def test_looking_loads_no_pytorch(verb: str, folder: Path) -> None:
    if ("check" in verb or "models" in verb) and not shape_cache.shipped():
        pytest.skip("the shipped shapes are of another version of timm")
    code = f"""
import contextlib, io, os, sys
os.chdir({str(folder)!r})
from prunesearch.cli import main
with contextlib.redirect_stdout(io.StringIO()) as said:
    code = main({verb.split()!r})
print(code, len(said.getvalue()) > 40, {HEAVY} & set(sys.modules))
"""
    assert run(code, XDG_CACHE_HOME=str(folder / "cache")) == "0 True set()"


def test_a_list_of_samplers_loads_nothing_that_they_use() -> None:
    heavy = "{'torch', 'optuna', 'sklearn', 'scipy', 'numpy'}"
    code = (
        f"import sys; from prunesearch.samplers import SAMPLERS; print(len(SAMPLERS) > 5, {heavy} & set(sys.modules))"
    )
    assert run(code) == "True set()"


def test_applying_a_schedule_needs_torch_timm_and_yaml_only(tmp_path: Path) -> None:
    """Applies a schedule in a process in which our other dependencies are missing."""
    (tmp_path / "best.yaml").write_text("version: 1\nstages: [{block: 1, keep: 0.5, reduce: squeeze}]\n")
    output = run(
        f"""
import sys
for name in ("ray", "optuna", "rich", "sklearn", "scipy", "matplotlib", "pydantic", "sqlalchemy"):
    sys.modules[name] = None  # importing it is an error, looking for it finds nothing
import timm, torch
from prunesearch import apply_schedule, estimate_cost, load_schedule, shape_of
model = timm.create_model("test_vit").eval()
schedule = load_schedule({str(tmp_path / "best.yaml")!r})
before = estimate_cost(shape_of(model)).macs
after = estimate_cost(shape_of(model), schedule).macs
print(apply_schedule(model, schedule)(torch.zeros(1, 3, 160, 160)).shape, after < before)
"""
    )
    assert output == "torch.Size([1, 1000]) True"


def test_every_public_name_is_there() -> None:
    import prunesearch

    for name in prunesearch.__all__:
        assert getattr(prunesearch, name) is not None and name in dir(prunesearch)
    with pytest.raises(AttributeError, match="aply_schedule"):
        prunesearch.aply_schedule  # noqa: B018
