"""Only what loads a heavy library is imported inside a function: everything else is imported at the top of its file."""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import cache

import pytest
from test_imports import MODULES, ROOMS, TREES, imported

HEAVY = {*ROOMS, "torchvision", "scipy", "safetensors", "numpy"}


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


@pytest.mark.parametrize("module", MODULES)
def test_only_heavy_modules_are_imported_inside_functions(module: str) -> None:
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    for other in imported(functions) & MODULES.keys():
        assert loads(other) & HEAVY, f"{module} imports {other} late, which loads nothing heavy: import it at top"


def test_no_late_name_is_that_of_a_module() -> None:
    """Once the module is imported, the package would give the module instead."""
    packages = [importlib.import_module(name) for name, path in MODULES.items() if path.name == "__init__.py"]
    late = {
        one.__name__: inspect.getclosurevars(one.__getattr__).nonlocals
        for one in packages
        if "__getattr__" in vars(one)
    }
    assert len(late) > 3
    for name, seen in late.items():
        assert not {f"{name}.{word}" for word in seen["homes"]} & MODULES.keys()
