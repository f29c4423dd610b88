"""The shipped search spaces are valid for their models, and their first line says what they explore."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunesearch.evaluate import model_shape
from prunesearch.files import load_study
from prunesearch.presets import load_preset
from prunesearch.search.problems import study_problems
from prunesearch.space.choices import parameters_of

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
        assert {f"{model}_{family}" for family in ("drop_vs_squeeze", "thresholds", "predictor", "everything")} <= names


@pytest.mark.parametrize("model", ["digits", "cifar10", "deit_small"])
def test_the_search_over_thresholds_learns_from_the_published_ones(model: str) -> None:
    (path,) = (path for path in FILES if path.stem == f"{model}_thresholds")
    config = load_study(path)
    shape = model_shape(config.model)
    for name in ("asvit-0.8", "asvit-0.65", "asvit-0.5"):
        assert name in config.space.start_from
        assert parameters_of(load_preset(name, shape), config.space) is not None
