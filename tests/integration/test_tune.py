"""Ray Tune: its schedulers run our evaluations, and its results can be imported into a study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from prunesearch.cli import main
from prunesearch.config import (
    Budget,
    Limit,
    ModelConfig,
    Range,
    SpaceConfig,
    StudyConfig,
    SupernetConfig,
    WorkersConfig,
)
from prunesearch.errors import StudyError
from prunesearch.evaluate import model_shape
from prunesearch.files import write_yaml
from prunesearch.schedule import Schedule
from prunesearch.search.driver import run_study
from prunesearch.space.choices import dimensions, uid_of
from prunesearch.strict import to_mapping
from prunesearch.study.reader import open_study_readonly
from prunesearch.tune.trainable import WORST, import_results, param_space, points_to_evaluate, trainable
from prunesearch.workers.ray_pool import _start_ray, ray

SPACE = SpaceConfig(blocks=(1, 2, 4), keep=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0), start_from=("evit-0.7",))
CONFIG = StudyConfig(
    version=1,
    name="doorway",
    model=ModelConfig("vit_digits_patch1_8"),
    space=SPACE,
    limits=(("gmacs", Limit(at_most=0.011)),),
    rungs=(Budget(images=64), Budget(images=128), Budget(images=256)),
    workers=WorkersConfig(kind="serial"),
)
GENTLE = {"block1.keep": 1.0, "block2.keep": 1.0, "block4.keep": 0.9}
STRONG = {"block1.keep": 0.5, "block2.keep": 0.6, "block4.keep": 1.0}
DENSE = dict.fromkeys(GENTLE, 1.0)


def unwrapped(config: StudyConfig, parameters: dict[str, Any], evaluate: str = "tune_fake:evaluate") -> Any:
    """A trial that runs in this process, without Ray."""
    return trainable(config, evaluate)(config=dict(parameters))


def test_spaces_are_domains_with_the_same_values() -> None:
    space = replace(SPACE, blocks=(1,), keep=Range(0.35, 0.95, 0.2), reduce=("drop", "fuse"), score=("key_norm",))
    config = replace(CONFIG, space=replace(space, start_from=()))
    domains = param_space(config)
    assert list(domains) == list(dimensions(config.space))
    assert domains["block1.keep"].categories == [0.35, 0.55, 0.75, 0.95]  # a choice: Tune's grids contain 0
    assert domains["block1.reduce"].categories == ["drop", "fuse"]
    on_grid = param_space(CONFIG)["block1.keep"]
    assert (on_grid.lower, on_grid.upper, on_grid.get_sampler().q) == (0.5, 1.0, 0.1)
    free = param_space(replace(config, space=replace(space, keep=Range(0.3, 0.9), start_from=())))["block1.keep"]
    assert (free.lower, free.upper) == (0.3, 0.9)


def test_limits_relative_to_the_dense_model() -> None:
    """A share of a computed metric is a number here too. What the dense model is measured with, no trial knows."""
    config = replace(CONFIG, limits=(("gmacs", Limit(at_most="80%")),))
    assert unwrapped(config, GENTLE).step()["cause"] == "invalid" and "feasible" in unwrapped(config, STRONG).step()
    with pytest.raises(StudyError, match=r"limits on top1 are relative to what .*Possible: numbers here"):
        trainable(replace(config, limits=(*config.limits, ("top1", Limit(drop_at_most=1.0)))))


def test_points_are_the_dense_model_and_those_start_schedules_that_the_space_holds() -> None:
    assert points_to_evaluate(CONFIG) == [DENSE]  # evit-0.7 has stages at other blocks
    blocks = replace(CONFIG, space=replace(SPACE, blocks=(2, 4, 6), reduce=("fuse",), keep=(0.7, 1.0)))
    points = points_to_evaluate(blocks)
    assert points[0] == dict.fromkeys(dimensions(blocks.space), 1.0)


def test_a_trial_goes_on_from_its_checkpoint_in_another_process(tmp_path: Path) -> None:
    first = unwrapped(CONFIG, STRONG)
    reports = [first.train()]
    saved = first.save(str(tmp_path / "checkpoint"))
    first.stop()  # deletes its scratch folder
    second = unwrapped(CONFIG, STRONG)
    second.restore(saved)
    reports += [second.train(), second.train()]
    weights = tmp_path / "last"
    second.save(str(weights))
    second.stop()
    assert [report["training_iteration"] for report in reports] == [1, 2, 3]
    assert [report["images"] for report in reports] == [64, 128, 256]
    assert [report["done"] for report in reports] == [False, False, True]
    assert all(report["feasible"] and report["should_checkpoint"] for report in reports)
    assert (weights / "candidate.state").read_text() == "012"  # each rung continued from the one below


def test_what_arithmetic_turns_down_is_a_result_without_an_evaluation() -> None:
    trial = unwrapped(CONFIG, GENTLE, "nowhere:never_called")
    report = trial.train()
    trial.stop()
    assert (report["feasible"], report["cause"], report["done"], report["images"]) == (0, "invalid", True, 0)
    assert (report["top1"], report["gmacs"]) == (-WORST, WORST)
    assert "gmacs" in report["error"] and "prunesearch" not in report


def test_anchors_are_evaluated_beyond_the_limits_and_a_process_takes_the_next_trial() -> None:
    trial = unwrapped(CONFIG, GENTLE)
    trial.train()
    assert trial.reset(dict(DENSE))
    report = trial.train()
    assert (report["feasible"], report["cause"], report["training_iteration"]) == (0, "", 1)
    assert report["gmacs"] > 0.011 and report["uid"] == uid_of(Schedule(), model_shape(CONFIG.model))
    assert trial.reset(dict(STRONG))
    assert trial.train()["feasible"] == 1
    trial.stop()


def test_shared_weights_are_refused() -> None:
    config = replace(CONFIG, evaluation="supernet", supernet=SupernetConfig(images=64))
    with pytest.raises(StudyError, match="evaluation is supernet"):
        trainable(config)


def write_trial(folder: Path, reports: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("".join(json.dumps(report) + "\n" for report in reports) + '{"cut o')


def test_an_import_keeps_what_came_furthest_and_refuses_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = unwrapped(CONFIG, STRONG)
    reports = [json.loads(json.dumps(trial.train(), default=str)) for _ in range(2)]
    trial.stop()
    write_trial(tmp_path / "results" / "a", reports[:1])
    write_trial(tmp_path / "results" / "b", reports)
    assert import_results(tmp_path / "results", CONFIG, tmp_path / "study") == 1
    assert import_results(tmp_path / "results", CONFIG, tmp_path / "study") == 0
    write_yaml(to_mapping(CONFIG), tmp_path / "study.yaml")
    files = [str(tmp_path / "results"), str(tmp_path / "study.yaml")]
    assert main(["import-tune", *files, "--output", str(tmp_path / "outputs")]) == 0
    assert f"1 new candidate -> {tmp_path / 'outputs' / 'doorway'}" in capsys.readouterr().out
    [record] = open_study_readonly(tmp_path / "study").records()
    assert (record.state, record.rung, record.origin) == ("paused", 1, "sampler")
    assert [evaluation.checkpoint for evaluation in record.evaluations] == [None, None]  # Tune kept no checkpoints
    other = replace(CONFIG, name="other", rungs=(Budget(images=32), Budget(images=128)))
    assert import_results(tmp_path / "results", other, tmp_path / "other") == 0
    with pytest.raises(StudyError, match="no trial in it has results of prunesearch"):
        import_results(tmp_path, CONFIG, tmp_path / "study")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    _start_ray(None)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Tune's warnings
def test_asha_searches_and_the_engine_continues(tmp_path: Path, cluster: None) -> None:
    scheduler = ASHAScheduler(max_t=3, grace_period=1, reduction_factor=2)
    results = tune.Tuner(
        trainable(CONFIG, "tune_fake:evaluate"),
        param_space=param_space(CONFIG),
        tune_config=tune.TuneConfig(metric="top1", mode="max", num_samples=10, scheduler=scheduler, reuse_actors=True),
        run_config=tune.RunConfig(name="experiment", storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert not results.errors
    evaluated = {result.metrics["uid"]: result.metrics for result in results if "uid" in result.metrics}
    assert import_results(results, CONFIG, tmp_path / "study") == len(evaluated)
    records = open_study_readonly(tmp_path / "study").records()
    for record in records:
        metrics = evaluated[record.uid]
        assert [evaluation.rung for evaluation in record.evaluations] == list(range(metrics["training_iteration"]))
        for evaluation in record.evaluations:
            if evaluation.status == "complete":
                state = tmp_path / "study" / "weights" / f"{record.uid}.{evaluation.rung}.state"
                assert f"{evaluation.checkpoint}.state" == str(state)
                assert state.read_text() == "012"[: evaluation.rung + 1]
    assert {record.rung for record in records} > {0}
    trials = replace(CONFIG.stop, trials=len(records) + 4)
    done = run_study(replace(CONFIG, stop=trials), tmp_path / "study", evaluate="tune_fake:evaluate")
    continued = {record.uid: record for record in open_study_readonly(tmp_path / "study").records()}
    assert len(continued) == len(records) + 4 and done.running == 0
    for record in records:
        assert continued[record.uid].evaluations[: len(record.evaluations)] == record.evaluations
