"""A computable limit that no schedule of a space keeps is reported before anything is evaluated."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fake_search import study

from prunesearch.config import Limit, ModelConfig, SpaceConfig, StudyConfig, SupernetConfig, Target, ThresholdRange
from prunesearch.errors import FileError, ScheduleError
from prunesearch.evaluate import METRICS, model_shape
from prunesearch.search.driver import run_study
from prunesearch.search.problems import study_problems
from prunesearch.space.choices import combination, combinations, schedule_from

SPACES = {
    "keep": SpaceConfig(blocks=(1, 3, 5), keep=(0.4, 0.7, 1.0), reduce=("drop", "merge")),
    "tokens": SpaceConfig(blocks=(2, 6), keep=(0.5, 1.0), reduce=("pool", "drop"), score=("key_norm",), tokens=(4, 16)),
    "few stages": SpaceConfig(blocks=(1, 2, 3, 4, 5, 6), keep=(0.5, 0.8, 1.0), max_stages=2),
    "predictor": SpaceConfig(blocks=(1, 4), keep=(0.5, 0.9), at=("pre",), score=("predictor",)),
}
MODEL = ModelConfig("vit_digits_patch1_8")
METRIC = pytest.mark.parametrize("metric", ["gmacs", "gmacs_p95", "parameters"])


def limited(space: str | SpaceConfig, metric: str, limit: Limit) -> StudyConfig:
    space = SPACES[space] if isinstance(space, str) else space
    return study(model=MODEL, space=space, limits=((metric, limit),))


def values(space: str, metric: str) -> list[float]:
    """The metric of every candidate of a space."""
    found = []
    for index in range(combinations(SPACES[space]) or 0):
        with suppress(ScheduleError):
            schedule = schedule_from(combination(SPACES[space], index), SPACES[space], model_shape(MODEL))
            value = METRICS[metric].of(Target(MODEL), schedule)
            assert value is not None
            found.append(value)
    return found


@METRIC
@pytest.mark.parametrize("space", SPACES)
def test_the_least_and_the_greatest_value_are_the_borders(space: str, metric: str) -> None:
    found = values(space, metric)
    for limit in (Limit(at_most=min(found)), Limit(at_least=max(found))):
        assert study_problems(limited(space, metric, limit)) == []
    for limit, said in (
        (Limit(at_most=min(found) * 0.999), f"at_most {min(found) * 0.999:g}, and {min(found):.4g} is the nearest"),
        (Limit(at_least=max(found) * 1.001), f"at_least {max(found) * 1.001:g}, and {max(found):.4g} is the nearest"),
    ):
        (problem,) = study_problems(limited(space, metric, limit))
        assert f"limits.{metric}: {said}" in problem and "Possible: " in problem


def test_a_space_whose_verb_cannot_always_keep_so_few_with_fewer_stages_is_checked() -> None:
    """Merging at most halves, so what a stage may keep depends on those before it; `max_stages` leaves some out."""
    keep = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    space = SpaceConfig(blocks=(1, 2, 3, 4, 5, 6), keep=keep, reduce=("drop", "merge"), max_stages=4)
    assert study_problems(limited(space, "gmacs", Limit(at_most="60%"))) == []


def test_what_only_images_tell_is_left_to_the_search() -> None:
    thresholds = SpaceConfig(blocks=(1, 3), amount=("threshold",), threshold=ThresholdRange(0.1, 1.0))
    assert study_problems(limited(thresholds, "gmacs", Limit(at_most=1e-6))) == []
    assert study_problems(limited("keep", "top1", Limit(at_least=99.999))) == []


@pytest.mark.parametrize("limits", [(("gmacs", Limit(1e-5)),), (("gmacs", Limit(0.012)), ("parameters", Limit(1e-9)))])
def test_shared_weights_are_not_begun(limits: tuple[tuple[str, Limit], ...], tmp_path: Path) -> None:
    config = replace(study(), limits=limits, evaluation="supernet", supernet=SupernetConfig(images=16))
    with pytest.raises(FileError, match=rf"limits.{limits[-1][0]}: at_most .* is the nearest"):
        run_study(config, tmp_path / "s")
    assert not (tmp_path / "s" / "study.db").exists()


def test_shared_weights_need_more_than_a_rare_schedule_within_all_limits(tmp_path: Path) -> None:
    """Each limit alone can be kept, both together cannot."""
    both = (("gmacs", Limit(at_most=0.0055)), ("gmacs_p95", Limit(at_least=0.012)))
    config = replace(study(), limits=both, evaluation="supernet", supernet=SupernetConfig(images=16))
    (problem,) = study_problems(config)
    assert "is within the limits, so shared weights cannot be trained" in problem
