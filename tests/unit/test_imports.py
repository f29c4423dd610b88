"""The layers of the package: imports only go down, form no circle, and heavy libraries stay in their rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "prunesearch"
FLOORS = [
    "errors", "printable", "moved", "registry", "extras", "recipes", "tasks", "plugins", "shape", "profile",
    "config", "tokens", "schedule", "strict", "yaml_text", "files", "json_schema", "cost", "presets", "space",
    "models", "evaluate", "device", "record", "confirmation", "front", "relative_limits", "workers", "study",
    "samplers", "search", "tune", "replay", "report", "export", "cli", "__main__",
]  # fmt: skip
"""A module may import from floors before its own."""
ROOMS = {
    "timm": ("models", "evaluate"),
    "torch": ("tokens", "models", "evaluate", "device", "export"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "openvino"), ("device", "export")),
    "optuna": ("study", "samplers"),
    "ray": ("workers", "tune"),
    "rich": ("report", "cli"),
    "matplotlib": ("report",),
    "sklearn": ("evaluate", "samplers", "replay"),
}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
del MODULES["prunesearch"]  # it names what is public, all of it late
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules that some statements import, at any place in them."""
    found = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only_and_heavy_libraries_stay_in_their_rooms(module: str) -> None:
    room = module.split(".")[1]
    for other in imported([TREES[module]]):
        if other.startswith("prunesearch."):
            assert FLOORS.index(other.split(".")[1]) <= FLOORS.index(room), f"{module} imports {other}, above it"
        assert room in ROOMS.get(other.split(".")[0], FLOORS), f"{module} imports {other}"


def test_no_imports_form_a_circle() -> None:
    TopologicalSorter({module: imported([TREES[module]]) & MODULES.keys() for module in MODULES}).prepare()
