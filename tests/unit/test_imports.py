"""The layers of the package: imports only go down, and only heavy modules are imported inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "prunesearch"
FLOORS = [
    "errors", "printable", "moved", "registry", "recipes", "plugins", "config", "shape", "tokens", "schedule",
    "strict", "yaml_text", "files", "json_schema", "cost", "presets", "space", "models", "evaluate", "record",
    "confirmation", "front", "workers", "study", "samplers", "search", "tune", "replay", "report", "export", "cli",
    "__main__",
]  # fmt: skip
"""A module may import from floors before its own."""
ROOMS = {
    "timm": ("models", "evaluate"),
    "torch": ("tokens", "models", "evaluate", "export"),
    "optuna": ("study", "samplers"),
    "ray": ("workers", "tune"),
    "rich": ("report", "cli"),
    "matplotlib": ("report",),
    "sklearn": ("evaluate", "samplers", "replay"),
}
HEAVY = {*ROOMS, "torchvision", "scipy", "safetensors", "numpy"}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Modules that some statements import, at any place in them."""
    found = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found


@cache
def loads(module: str) -> set[str]:
    """Top-level packages and modules of ours that come with importing a module."""
    found, left = set(), {module}
    while left:
        found |= left
        trees = [TREES[name] for name in left if name in MODULES]
        top = imported(node for tree in trees for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        left = (top | {name.rpartition(".")[0] for name in left if "." in name}) - found
    return {name if name in MODULES else name.split(".")[0] for name in found}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [module for module in MODULES if module != "prunesearch"])
def test_imports_go_down_only_and_heavy_libraries_stay_in_their_rooms(module: str) -> None:
    for other in imported([TREES[module]]):
        if other.startswith("prunesearch."):
            assert FLOORS.index(room_of(other)) <= FLOORS.index(room_of(module)), f"{module} imports {other}, above it"
        assert room_of(module) in ROOMS.get(other.split(".")[0], FLOORS), f"{module} imports {other}"
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    for other in imported(functions) & MODULES.keys():
        assert loads(other) & HEAVY, f"{module} imports {other} late, which loads nothing heavy: import it at top"


def test_no_imports_form_a_circle() -> None:
    graph = {module: imported([TREES[module]]) & MODULES.keys() - {"prunesearch"} for module in MODULES}
    graph["prunesearch"] = set()
    TopologicalSorter(graph).prepare()
