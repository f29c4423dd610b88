"""The core without extras: what works with it, and what the rest says. Libraries are hidden from fresh processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_search
import pytest
from PIL import Image

from prunesearch.config import WorkersConfig
from prunesearch.errors import MissingLibraryError, UserError
from prunesearch.samplers import SAMPLERS
from prunesearch.search.driver import _start_workers

LIBRARIES = {
    "search": ("optuna", "sqlalchemy", "ray", "scipy", "sklearn"),
    "plot": ("matplotlib",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "postgres": ("psycopg",),
}
PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()
MODEL = "vit_digits_patch1_8"
SCHEDULE = f"""
version: 1
model: {{name: {MODEL}, options: {{depth: 2}}}}
data: {{name: folder, root: data}}
stages: [{{block: 1, keep: 0.5, reduce: squeeze}}]
"""
STUDY = f"""
version: 1
name: light
model: {{name: {MODEL}, options: {{depth: 4}}}}
data: {{name: folder, root: data}}
space: {{blocks: [1, 2, 3], keep: [0.5, 1.0], reduce: [drop], start_from: [evit-0.7]}}
workers: {{kind: serial}}
stop: {{trials: 3}}
"""
SHORT = "--batch 1 --threads 1 --seconds 0.1"
WORKS = {
    f"profile {MODEL} {SHORT} --verb squeeze --score class_attention -o model.json": "do not depend on tokens",
    f"profile study.yaml {SHORT} --brief -o study.json": "^batch 1: .* ms",
    f"profile {MODEL} {SHORT} --verb drop --score class_attention --json": '"model": "vit_digits',
    "check best.yaml --set model.options.depth=8 --profile model.json": "1 in torch on .* ms predicted",
    "check study.yaml --deep --set device.profile=study.json --set metrics=[predicted_latency_ms]": (
        "light: fine. 3 parameters.*Weights and data: fine"
    ),
    "evaluate best.yaml --metric gmacs --metric agreement": "gmacs",
    "sensitivity study.yaml --images 4": "drop",
    "list scores": "class_attention",
    "list samplers": "token_gp",
    "list models vit_digits*": MODEL,
    "schema": "objectives",
    "export best.yaml --onnx best.onnx": "GMACs, dense",
}
FAILS = {  # what needs an extra -> a library that it says, and the extra
    "run study.yaml": ("optuna", "search"),
    "resume study": ("sqlalchemy", "search"),
    "confirm study": ("optuna", "search"),
    "status study": ("optuna", "search"),
    "front study": ("optuna", "search"),
    "front study --plot front.png": ("matplotlib", "plot"),
    "export study -o chosen.yaml": ("optuna", "search"),
    "import-tune results study.yaml": ("ray", "search"),
    "evaluate best.yaml --study study": ("optuna", "search"),
    "evaluate best.yaml --data digits": ("scikit-learn", "search"),
    "sensitivity study.yaml --plot x.png": ("matplotlib", "plot"),
    f"profile {MODEL} --plot x.png": ("matplotlib", "plot"),
    f"profile {MODEL} --runtime onnxruntime": ("onnxruntime", "onnx"),
    f"profile {MODEL} --runtime openvino": ("openvino", "openvino"),
    "export best.yaml --onnx x.onnx": ("onnxscript", "onnx"),
    "export best.yaml --openvino x.xml": ("openvino", "openvino"),
}
BEHIND_DOORS = {  # nobody imports these without a question before
    "prunesearch.replay.surrogate",
    "prunesearch.samplers.optuna_samplers",
    "prunesearch.samplers.token_gp",
    "prunesearch.workers.ray_pool",
}
COMMANDS = """
import contextlib, io, json, sys
from prunesearch.cli import main
answers = {}
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        answers[command] = [main(command.split()), out.getvalue(), err.getvalue()]
"""
PYTHON = """
import timm, torch
from prunesearch import apply_schedule, estimate_cost, load_schedule, shape_of
from prunesearch.presets import find_schedule
model = timm.create_model("vit_digits_patch1_8", depth=2)
schedule = load_schedule("best.yaml")
logits = apply_schedule(model, schedule)(torch.zeros(1, 1, 8, 8))
shape = shape_of(timm.create_model("vit_digits_patch1_8"))
preset = estimate_cost(shape, find_schedule("evit-0.7", shape)).macs
answers["python"] = [list(logits.shape), preset < estimate_cost(shape).macs]
"""
MODULES = """
import importlib, pkgutil
import prunesearch
from prunesearch.errors import MissingLibraryError
answers["modules"] = {}
for module in pkgutil.walk_packages(prunesearch.__path__, "prunesearch.", onerror=print):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            answers["modules"][module.name] = [isinstance(error, MissingLibraryError), str(error)]
"""


def without(extras: list[str], commands: list[str], code: str, folder: Path) -> dict[str, Any]:
    """Run commands and code in a process in which the libraries of some extras are missing; returns `answers`."""
    hidden = [name for extra in extras for name in LIBRARIES[extra]]
    start = f"import sys\nfor name in {hidden}:\n    sys.modules[name] = None\ncommands = {commands}"
    process = [sys.executable, "-c", f"{start}\n{COMMANDS}\n{code}\nprint(json.dumps(answers))"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    result = subprocess.run(process, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a schedule file, a study file and pictures of ten classes."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "best.yaml").write_text(SCHEDULE)
    (folder / "study.yaml").write_text(STUDY)
    (folder / "study").mkdir()
    for place in (folder / "data" / split / str(kind) for split in ("train", "val") for kind in range(10)):
        place.mkdir(parents=True)
        Image.new("L", (8, 8), 20 * int(place.name)).save(place / "0.png")
    return folder


@pytest.fixture(scope="module")
def core(folder: Path) -> dict[str, Any]:
    """What commands say with the core and the extra onnx."""
    return without(["search", "plot", "openvino", "postgres"], list(WORKS), PYTHON, folder)


@pytest.fixture(scope="module")
def refused(folder: Path) -> dict[str, Any]:
    """What commands and imports say with the core alone."""
    return without(list(LIBRARIES), list(FAILS), MODULES, folder)


@pytest.mark.parametrize("command", WORKS)
def test_the_core_is_enough(command: str, core: dict[str, Any]) -> None:
    code, out, err = core[command]
    assert code == 0 and re.search(WORKS[command], out, re.DOTALL), (out, err)


def test_the_core_is_enough_in_python(core: dict[str, Any]) -> None:
    assert core["python"] == [[1, 10], True]


@pytest.mark.parametrize("command", FAILS)
def test_what_needs_an_extra_says_so_in_one_error(command: str, refused: dict[str, Any]) -> None:
    code, out, err = refused[command]
    library, extra = FAILS[command]
    assert code == 2 and not out
    assert re.fullmatch(
        rf"prunesearch: [^\n]*\b{library}\b[^\n]* not installed\. Possible: the libraries of the extra '{extra}'\. "
        rf"Run pip install 'prunesearch\[{extra}\]'\.\n",
        err,
    )
    assert re.search(rf'"{library}[\[>]', brings(extra)), f"the extra {extra} does not bring {library}"


def brings(extra: str) -> str:
    """The lines of pyproject.toml of an extra."""
    found = re.search(rf"^{extra} = \[(.*?)\](?: *#.*)?$", PROJECT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_modules_are_imported_or_say_which_extra_they_need(refused: dict[str, Any]) -> None:
    plain = {name for name, (is_ours, _) in refused["modules"].items() if not is_ours}
    assert plain == BEHIND_DOORS
    for name in ("search.driver", "study", "tune", "report.live"):
        assert "pip install 'prunesearch[search]'" in refused["modules"][f"prunesearch.{name}"][1]


def test_the_core_needs_nothing_of_an_extra() -> None:
    core = re.search(r"^dependencies = \[.*?^\]", PROJECT, re.MULTILINE | re.DOTALL)
    assert core is not None
    assert set(re.findall(r'^    "([a-z]+)', core[0], re.MULTILINE)) == {
        *("torch", "timm", "pyyaml", "safetensors", "numpy", "rich")
    }


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_name_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = SimpleNamespace(sampler=SAMPLERS[name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=rf"sampler {name}: .*scipy.*'prunesearch\[search\]'"):
        SAMPLERS[name].make(settings)


def test_workers_on_ray_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = fake_search.study(workers=WorkersConfig(kind="ray"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"workers.kind: ray: ray is not.*'prunesearch\[search\]'"):
        _start_workers(tmp_path, config, tmp_path, "x:y")
