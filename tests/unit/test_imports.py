"""The floors of the house, and the light import: both are promises that are easy to break by accident."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "prunesearch"
FLOORS = (
    *(
        "errors",
        "printable",
        "moved",
        "registry",
        "recipes",
        "plugins",
        "config",
        "shape",
        "tokens",
        "schedule",
        "strict",
    ),
    *("yaml_text", "files", "json_schema", "cost", "presets", "space", "models", "evaluate", "record", "confirmation"),
    *("front", "workers", "study", "samplers", "search", "tune", "replay", "report", "export", "cli", "__main__"),
)
ROOMS = {
    "timm": ("models", "evaluate"),
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


def imported(module: str) -> set[str]:
    """Modules that a module imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [module for module in MODULES if module != "prunesearch"])
def test_imports_go_down_only_and_heavy_libraries_stay_in_their_rooms(module: str) -> None:
    for other in imported(module):
        if other.startswith("prunesearch."):
            assert FLOORS.index(room_of(other)) <= FLOORS.index(room_of(module)), f"{module} imports {other}, above it"
        assert room_of(module) in ROOMS.get(other.split(".")[0], FLOORS), f"{module} imports {other}"


def test_no_imports_form_a_circle() -> None:
    graph = {module: imported(module) & MODULES.keys() - {"prunesearch"} for module in MODULES}
    graph["prunesearch"] = set()
    TopologicalSorter(graph).prepare()
