"""The search spaces that ship: each is without mistakes for its model, and says what it explores."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunesearch.files import load_study
from prunesearch.search.problems import study_problems

FILES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_shipped_search_spaces_are_without_mistakes(path: Path) -> None:
    config = load_study(path)
    assert study_problems(config) == []
    assert config.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_every_model_has_every_family() -> None:
    names = {path.stem for path in FILES}
    for model in ("digits", "cifar10", "deit_small"):
        assert {f"{model}_{family}" for family in ("thresholds", "predictor", "everything")} <= names
