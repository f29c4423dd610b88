"""The README: its promises have tests, its commands parse, its code runs, its links and numbers are right."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
import yaml

from prunesearch.cli import _parser, main
from prunesearch.evaluate.shape_cache import all_models, shipped
from prunesearch.files import load_study
from prunesearch.presets import presets

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [path.relative_to(ROOT) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))]


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def promises() -> list[str]:
    """The bold text at the start of each list item."""
    return re.findall(r"^- \*\*(.+?)\*\*", section("What you can rely on"), re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = (line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    prunesearch "))
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def names_of_tests() -> set[str]:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("test_*.py"))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("promise", promises())
def test_every_promise_has_a_test_named_after_it(promise: str, names_of_tests: set[str]) -> None:
    words = re.sub(r"[^a-z0-9]+", "_", promise.lower().replace("'", "")).strip("_")
    assert f"test_{words}" in names_of_tests


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    _parser().parse_args(shlex.split(command)[1:])


def test_the_study_file_and_the_schedule_file_are_such(tmp_path: Path) -> None:
    text, schedule = blocks("yaml")
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    assert load_study(tmp_path / "study.yaml").name == yaml.safe_load(text)["name"]
    (tmp_path / "mine.yaml").write_text(schedule, encoding="utf-8")
    assert main(["check", str(tmp_path / "mine.yaml")]) == 0


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in place of weights from a hub."""
    real = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **given: real(name, depth=8, **given).eval()
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.yaml").write_text("version: 1\nstages: [{block: 1, keep: 0.5}]\n")
    model = timm.create_model("deit_small_patch16_224", pretrained=False)
    names = {"timm": timm, "torch": torch, "model": model, "images": torch.zeros(1, 3, 224, 224)}
    for block in blocks("python"):
        exec("from prunesearch import *\n" + block, names)
    assert names["logits"].shape == (1, 1000)  # type: ignore[attr-defined]
    assert names["classes"].shape == (1, 224, 224)  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target


def test_presets_are_as_many_as_it_says() -> None:
    assert f"All {len(presets())} (`prunesearch list presets`)" in README


@pytest.mark.skipif(not shipped(), reason="the recorded shapes are of another version of timm")
def test_names_of_models_are_as_many_as_it_says() -> None:
    found = [facts for _, facts in all_models()]
    holds = [facts.shape.holds for facts in found]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\d+) \|", README, re.MULTILINE)
    assert sum(int(number) for _, number in rows) == len(found)
    for classes, number in rows:
        assert sum(f"`{facts.family}`" in classes.split(", ") for facts in found) == int(number), classes
    assert f"**Models.** {len(holds)} names of timm {timm.__version__}" in README
    assert f"every supported ViT ({holds.count(False)} names in timm {timm.__version__})" in README


def test_the_recipes_for_plugins_run_as_they_stand(tmp_path: Path) -> None:
    """Imports, learned score and verb of CONTRIBUTING, in a module of their own, on a model."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^(?: {4}.*)?\n)+", text, re.M) if block.strip()]
    wanted = ("import torch", "def my_score", "@scorer(", "def _masked")
    code = [next(block for block in blocks if block.lstrip().startswith(start)) for start in wanted]
    code[1] = (
        "@scorer('my_score', source='', macs=lambda shape, tokens: 0)\n" + code[1].lstrip().partition("Scorer(")[0]
    )
    (tmp_path / "theirs.py").write_text("\n".join(code))
    (tmp_path / "use.py").write_text(USE)
    path = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    subprocess.run([sys.executable, str(tmp_path / "use.py")], check=True, env=path)


USE = """
import theirs, timm, torch
from prunesearch import Schedule, Stage, apply_schedule
for score in ("my_score", "learned_score"):
    model = timm.create_model("test_vit").eval()
    apply_schedule(model, Schedule((Stage(1, keep=0.5, score=score, reduce="mean_token"),)))
    assert model(torch.rand(2, 3, 160, 160)).isfinite().all()
"""
