"""No code compares names of scores, verbs or samplers: it must use facts of their registry entries."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from prunesearch.samplers import SAMPLERS
from prunesearch.tokens import REDUCERS, SCORERS

PACKAGE = Path(__file__).parents[2] / "prunesearch"
NAMES = {*SCORERS, *REDUCERS, *SAMPLERS}
OTHER_WORDS = {
    "device/profiles.py": {"auto"},
    "evaluate/machine.py": {"auto"},
    "evaluate/siblings.py": {"auto"},
    "workers/ray_pool.py": {"auto"},
}
"""Registered names with another meaning in a file: "auto" is a device, siblings to be found, or the running cluster."""
NOTATION = {"DEFAULT_SCORE"}
"""Constants that only shorten printed schedules, and decide nothing."""
CONSTANTS = {
    target.id: node.value
    for path in PACKAGE.rglob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name) and target.id not in NOTATION
}


def names_in(node: ast.AST) -> set[str]:
    """Registered names among the literals of an expression, including those of constants that it refers to."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and part.value in NAMES:
            found.add(part.value)
        constant = CONSTANTS.get(part.id) if isinstance(part, ast.Name) else None
        if isinstance(constant, ast.Constant | ast.Tuple | ast.Set | ast.List):
            found |= {one.value for one in ast.walk(constant) if isinstance(one, ast.Constant)} & NAMES
    return found


def decisions(tree: ast.AST, other_words: Container[str] = ()) -> Iterator[tuple[int, set[str]]]:
    """Lines where a name decides: comparisons, patterns, keys of a dict, subscripts, and .get, .startswith, ..."""
    for node in ast.walk(tree):
        places: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            places = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            places = [node.value]
        elif isinstance(node, ast.Dict):
            places = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Subscript):
            places = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            places = list(node.args) if node.func.attr in ("get", "startswith", "endswith", "index", "count") else []
        found = {name for name in set().union(*map(names_in, places)) if name not in other_words}
        if found:
            yield node.lineno, found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_score_verb_or_sampler_is_known_by_name(path: Path) -> None:
    other_words = OTHER_WORDS.get(str(path.relative_to(PACKAGE)), ())
    assert list(decisions(ast.parse(path.read_text()), other_words)) == []


@pytest.mark.parametrize(
    "code",
    [
        'x = stage.reduce == "pool"',
        'x = stage.reduce in ("merge", "other")',
        'x = "merge" not in verbs',
        'x = {"drop": 1}',
        'x = table["key_norm"]',
        'x = table.get("hold")',
        'x = name.startswith("squeeze")',
        'match name:\n    case "fuse":\n        pass',
        'x = config.sampler.name != "auto"',
        'x = "nsga2" if name == "tpe" else None',
    ],
)
def test_the_search_for_names_finds_them(code: str) -> None:
    assert len(list(decisions(ast.parse(code)))) == 1
