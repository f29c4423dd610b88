"""Limits relative to the dense model: shares and drops in study files, in searches and when looking at a study."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_search
import optuna
import pytest
from dying import Killed, die_at
from fake_search import RUNGS, SHAPE, records, run, small_study, study

from prunesearch.cli import main
from prunesearch.config import ConfirmConfig, IsoBudget, Limit, ModelConfig, Objective, SpaceConfig, StudyConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import FileError, RunError, StudyError
from prunesearch.evaluate import METRICS, computed_metric
from prunesearch.evaluate.limits import (
    AbsoluteLimit,
    Limits,
    WrittenLimits,
    budget_of,
    computed_limits,
    excess,
    resolved_limits,
    total_excess,
)
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import load_study, write_yaml
from prunesearch.json_schema import json_schema
from prunesearch.record import Record
from prunesearch.relative_limits import (
    asked_limits,
    dense_problem,
    dense_record,
    limit_lines,
    limits_at,
    limits_of,
)
from prunesearch.samplers.sampler_state import SamplerState
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.confirm import wanted
from prunesearch.search.driver import run_study
from prunesearch.search.problems import study_problems
from prunesearch.search.promotions import Promotions
from prunesearch.search.state import SearchState
from prunesearch.space.choices import uid_of
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.study.reader import open_study_readonly
from prunesearch.workers.outbox import evaluate_into

DENSE = uid_of(Schedule(), SHAPE)
DENSE_GMACS = estimate_cost(SHAPE).gmacs
TWENTY_POINTS = (("top1", Limit(drop_at_most=20.0)),)


def limited(**limits: Limit) -> StudyConfig:
    return study(limits=tuple(sorted(limits.items())))


def evaluated(number: int, top1: float, *more: float, origin: str = "sampler", gmacs: float = 0.01) -> Record:
    """A candidate with these values of top1 at its rungs, lowest first."""
    uid, schedule = (DENSE, Schedule()) if origin == "dense" else (f"u{number}", Schedule((Stage(1, keep=0.7),)))
    found = tuple(
        Evaluation(uid, "complete", rung, metrics=(("top1", value), ("gmacs", gmacs)))
        for rung, value in enumerate((top1, *more))
    )
    return Record(number, uid, schedule, "complete", origin, 0, found, tuple(range(len(found))), len(found) - 1)


# --- from words to numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "dense", "expected"),
    [
        (Limit(at_most=3.5), None, AbsoluteLimit(at_most=3.5)),
        (Limit(at_most="70%"), 90.0, AbsoluteLimit(at_most=63.0)),
        (Limit(at_most="70 %"), 90.0, AbsoluteLimit(at_most=63.0)),
        (Limit(at_least="130.5%"), 200.0, AbsoluteLimit(at_least=261.0)),
        (Limit(at_most="100%"), 0.1 + 0.2, AbsoluteLimit(at_most=0.1 + 0.2)),  # exactly
        (Limit(at_most="70%", at_least=1.0), None, AbsoluteLimit(at_least=1.0)),  # the share waits, the number does not
        (Limit(at_most="70%"), 0.0, AbsoluteLimit()),
        (Limit(drop_at_most=1.0), None, AbsoluteLimit()),
        (Limit(drop_at_most=1.0, at_least=70.0), 90.0, AbsoluteLimit(at_least=89.0)),  # the stricter one
        (Limit(drop_at_most=1.0, at_least="99.9%"), 90.0, AbsoluteLimit(at_least=89.91)),
    ],
)
def test_bounds_become_numbers(limit: Limit, dense: float | None, expected: AbsoluteLimit) -> None:
    ((name, found),) = resolved_limits([("top1", limit)], {} if dense is None else {"top1": dense})
    assert name == "top1"
    assert found.at_most == expected.at_most
    assert found.at_least == (None if expected.at_least is None else pytest.approx(expected.at_least, rel=1e-8))


def test_a_drop_is_towards_what_is_worse() -> None:
    drop = Limit(drop_at_most=0.5)
    found = dict(resolved_limits([("top1", drop), ("loss", drop)], {"top1": 90.0, "loss": 1.0}))
    assert [found["top1"].excess(value) > 0 for value in (89.4, 89.6, 95.0)] == [True, False, False]
    assert [found["loss"].excess(value) > 0 for value in (1.6, 1.4, 0.1)] == [True, False, False]
    theirs = [("theirs", drop)]  # of a plug-in that is not imported: the objectives know which way is better
    assert resolved_limits(theirs, {"theirs": 1.0}) == (("theirs", AbsoluteLimit()),)
    ((_, known),) = resolved_limits(theirs, {"theirs": 1.0}, [Objective("theirs", "maximize")])
    assert known.at_least == pytest.approx(0.5) and known.at_most is None


def test_a_drop_of_whole_images_does_not_depend_on_rounding() -> None:
    images, right, lost = 1797, 1617, 5
    dense, pruned, drop = 100 * right / images, 100 * (right - lost) / images, 100 * lost / images
    assert pruned < dense - drop  # in floating point
    ((_, limit),) = resolved_limits([("top1", Limit(drop_at_most=drop))], {"top1": dense})
    assert limit.excess(pruned) <= 0 < limit.excess(100 * (right - lost - 1) / images)


def test_what_has_no_bound_yet_judges_nothing() -> None:
    limits = (("top1", AbsoluteLimit()), ("gmacs", AbsoluteLimit(at_most=2.0)))
    assert excess(limits, {"top1": 0.0, "gmacs": 3.0}) == {"gmacs": 1.0}
    assert total_excess(limits, {"top1": 0.0, "gmacs": 1.0}) == 0


# --- study files -------------------------------------------------------------------------------------------------


def test_a_study_keeps_what_was_written(tmp_path: Path) -> None:
    config = replace(
        limited(gmacs=Limit(at_most="70 %"), top1=Limit(drop_at_most=1.0)), budget=IsoBudget("60%"), name="words"
    )
    write_yaml(to_mapping(config), tmp_path / "study.yaml")
    assert load_study(tmp_path / "study.yaml") == config
    assert "at_most: 70 %" in (tmp_path / "study.yaml").read_text()
    changed = load_study(tmp_path / "study.yaml", ["limits.gmacs.at_most=65.5%", "budget.gmacs=0.009"])
    assert dict(changed.limits)["gmacs"] == Limit(at_most="65.5%") and changed.budget == IsoBudget(0.009)


@pytest.mark.parametrize("written", ["-5%", "70", "abc", "7e1%", "%", "1234567%", "nan%", "70%%", True, [1], {"a": 1}])
@pytest.mark.parametrize("place", ["limits.gmacs.at_most", "limits.throughput.at_least", "budget.gmacs"])
def test_other_words_are_refused(place: str, written: Any) -> None:
    section, *_, field = place.split(".")
    metric = place.split(".")[1]
    value = {field: written} if section == "budget" else {metric: {field: written}}
    with pytest.raises(FileError) as caught:
        from_mapping(StudyConfig, {**to_mapping(study()), section: value}, "here")
    assert f"{place}: is " in str(caught.value)
    assert "possible: a number, or a share of the dense model's value such as 70%" in str(caught.value)


def test_the_json_schema_has_the_same_forms() -> None:
    definitions = json_schema(StudyConfig)["$defs"]
    for field in (definitions["Limit"]["properties"]["at_most"], definitions["IsoBudget"]["properties"]["gmacs"]):
        (pattern,) = [one["pattern"] for one in field["anyOf"] if one["type"] == "string"]
        assert re.search(pattern, "70%") and re.search(pattern, "99.5 %") and not re.search(pattern, "-70%")
        assert any(one["type"] == "number" and "maximum" in one for one in field["anyOf"])
    assert definitions["Limit"]["properties"]["drop_at_most"]["anyOf"][0] == {
        "type": "number",
        "minimum": 0,
        "maximum": 1e12,
    }


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"gmacs": Limit(at_most="0%")}, r"limits.gmacs.at_most: is 0 % of the dense model's value. Possible: above"),
        ({"top1": Limit(at_least="0.0 %")}, r"limits.top1.at_least: is 0 %"),
        ({"gmacs": Limit(drop_at_most=1.0)}, r"limits.gmacs.drop_at_most: gmacs is computed .*Possible: at_most,"),
        ({"top1": Limit(drop_at_most=100.5)}, r"limits.top1.drop_at_most: is 100.5, but top1 is a percentage"),
        ({"top1": Limit(at_most="50%", at_least="70 %")}, r"top1: at_most 50 % is below at_least 70 %"),
        ({"gmacs": Limit(at_most="50%", at_least=0.012)}, r"gmacs: at_most 50 % = 0.0064\d+ is below at_least 0.012,"),
        ({"gmacs": Limit(at_most="10%")}, r"limits.gmacs: at_most 10 % = 0.0012833, and 0.00\d+ is the nearest"),
        ({"tpo1": Limit(drop_at_most=1.0)}, r'limits.tpo1: unknown metric .*mean "top1"'),
        ({"top1": Limit()}, r"limits.top1: has no bound. Possible: at_most, at_least, drop_at_most"),
    ],
)
def test_mistakes_of_meaning_are_found_once(limits: dict[str, Limit], said: str) -> None:
    found = study_problems(limited(**limits))
    assert sum(re.search(said, problem) is not None for problem in found) == 1, found


def test_what_makes_sense_is_accepted() -> None:
    """Also more than all of a cost: parameters may grow with a predictor, and latency may be allowed to grow."""
    good = limited(
        gmacs=Limit(at_most="70%"),
        gmacs_p95=Limit(at_most="120%"),
        latency_ms=Limit(at_most="110%"),
        throughput=Limit(at_least="130%"),
        top1=Limit(drop_at_most=0.0, at_least=50.0),
        parameters=Limit(at_most="100%"),
    )
    assert study_problems(replace(good, space=SpaceConfig(blocks=(1, 2), keep=(0.5, 1.0)))) == []


def test_check_says_what_a_share_comes_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(
        limited(gmacs=Limit(at_most="70%"), top1=Limit(drop_at_most=1.0), latency_ms=Limit(at_most="90%")),
        budget=IsoBudget("60%"),
    )
    write_yaml(to_mapping(config), tmp_path / "study.yaml")
    assert main(["check", str(tmp_path / "study.yaml")]) == 0
    said = re.sub(" +", " ", capsys.readouterr().out)
    assert "limit gmacs at most 70 % = 0.0089831\n" in said
    assert "limit top1 at most 1 worse than dense (dense is measured first)\n" in said
    assert "limit latency_ms at most 90 % (dense is measured first)\n" in said
    assert "budget gmacs 60 % = 0.0076998\n" in said


# --- what arithmetic knows ---------------------------------------------------------------------------------------


@pytest.fixture
def tokens_left() -> Iterator[str]:
    """A computed metric of a plug-in, to be maximized: patch tokens at the end."""

    @computed_metric("tokens_left", unit="", goal="maximize", summary="...")
    def compute(model: ModelConfig, schedule: Schedule) -> float:
        return float(estimate_cost(SHAPE, schedule).tokens[-1] - 1)

    yield "tokens_left"
    del METRICS._things["tokens_left"]


@pytest.mark.parametrize("metric", ["gmacs", "gmacs_p95", "parameters", "tokens_left"])
def test_a_share_of_a_computed_metric_is_a_number_before_the_search(metric: str, tokens_left: str) -> None:
    goal = METRICS[metric].goal
    limit = Limit(at_most="80%") if goal == "minimize" else Limit(at_least="80%")
    dense = METRICS[metric].of(study().target, Schedule())
    assert dense is not None
    assert dense is not None
    ((_, found),) = computed_limits(limited(**{metric: limit}))
    assert (found.at_most if goal == "minimize" else found.at_least) == pytest.approx(0.8 * dense)
    dropping = Limit(drop_at_most=1.0)
    (problem,) = [one for one in study_problems(limited(**{metric: dropping})) if "drop_at_most" in one]
    assert f"Possible: {'at_most' if goal == 'minimize' else 'at_least'}, " in problem


def test_no_share_of_a_computed_metric_that_is_zero(tokens_left: str) -> None:
    @computed_metric("nothing", unit="", goal="minimize", summary="...")
    def compute(model: ModelConfig, schedule: Schedule) -> float:
        return 0.0

    try:
        (problem,) = study_problems(limited(nothing=Limit(at_most="50%")))
    finally:
        del METRICS._things["nothing"]
    assert "limits.nothing: a share of the dense model's value, which is 0. Possible" in problem


def test_a_search_with_a_share_is_the_search_with_its_number(tmp_path: Path) -> None:
    found = {}
    for name, bound in {"share": "70%", "number": 0.7 * DENSE_GMACS}.items():
        config = study(14, "tpe", limits=(("gmacs", Limit(at_most=bound)),))
        run(config, tmp_path / name)
        found[name] = records(tmp_path / name)
        stored = open_study_readonly(storage=f"journal:{tmp_path / name / 'study.log'}").config
        assert dict(stored.limits)["gmacs"].at_most == bound  # as it was written
    assert [record.uid for record in found["share"]] == [record.uid for record in found["number"]]
    costs = [dict(record.evaluations[0].metrics)["gmacs"] for record in found["share"]]
    assert all(cost <= 0.7 * DENSE_GMACS for cost in costs[1:]) and costs[0] == DENSE_GMACS


def test_a_budget_may_be_a_share(tmp_path: Path) -> None:
    number = 60 / 100 * DENSE_GMACS
    found = budget_of(study(budget=IsoBudget("60%")))
    assert found is not None and (found.metric, found.amount) == ("gmacs", pytest.approx(number))
    uids = []
    for name, gmacs in {"share": "60%", "number": number}.items():
        run(study(8, budget=IsoBudget(gmacs)), tmp_path / name)
        uids.append([record.uid for record in records(tmp_path / name)])
    assert uids[0] == uids[1] and len(uids[0]) == 8
    for share, said in {"0%": "0 % = 0", "10%": "10 % = 0.0012833", "100%": "100 % = 0.012833"}.items():
        (problem,) = study_problems(study(budget=IsoBudget(share)))
        assert f"budget.gmacs: {said}; possible: from " in problem
    limits = (("gmacs", Limit(at_most="60%")),)
    assert study_problems(study(budget=IsoBudget("60%"), limits=limits)) == []
    (problem,) = study_problems(study(budget=IsoBudget("65%"), limits=limits))
    assert "every candidate costs the budget, 65 % = 0.0083" in problem


# --- what is measured --------------------------------------------------------------------------------------------


def test_each_rung_is_compared_with_the_dense_model_there() -> None:
    config = replace(small_study(5), limits=(("gmacs", Limit(at_most="50%")), ("top1", Limit(drop_at_most=1.0))))
    dense = evaluated(0, 90.0, 95.0, origin="dense")
    for rung, expected in enumerate((89.0, 94.0)):
        limits = dict(limits_at(config, dense, rung))
        assert limits["top1"].at_least == pytest.approx(expected) and limits["gmacs"].at_most is not None
    for known, rung in ((dense, 2), (None, 0)):  # not measured there yet: arithmetic knows its part
        limits = dict(limits_at(config, known, rung))
        assert not limits["top1"].judges and limits["gmacs"].judges


def test_the_front_and_promotions_wait_for_the_dense_model() -> None:
    config = replace(small_study(5), limits=TWENTY_POINTS)
    good, bad = evaluated(1, 85.0), evaluated(2, 60.0)
    bounds: dict[str, float] = {}

    def judged(found: Sequence[Record]) -> dict[str, float]:
        results = Promotions(config, found)._results[0]
        return {uid: result.excess for uid, result in results.items()}

    assert judged([good, bad]) == {"u1": 0, "u2": 0}
    assert limits_of(config, [good, bad]) == (("top1", AbsoluteLimit()),)
    (line,) = limit_lines(config, [good, bad])
    assert line == "top1 at most 20 worse than dense (not judged, as the dense model has no result yet)"
    dense = evaluated(0, 100.0, origin="dense")
    bounds = judged([good, bad, dense])
    assert bounds["u1"] == 0 and bounds["u2"] == pytest.approx(20 / 80)
    assert limit_lines(config, [good, bad, dense]) == ["top1 at most 20 worse than dense = at least 80"]
    state = SearchState(config, SHAPE, [], [good, bad])
    assert state.promotions._results[0] == {}
    state.learn_all()
    state.begin(replace(dense, evaluations=(), orders=(), state="running"))
    state.finish(dense, dense.evaluations[0])
    assert {uid: result.excess for uid, result in state.promotions._results[0].items()} == bounds
    lower = evaluated(3, 80.0, 70.0)  # the dense model has no result at rung 1
    (line,) = limit_lines(config, [dense, lower])
    assert "not judged, as the dense model has no result at rung 1 yet" in line


def test_only_the_front_within_is_confirmed(tmp_path: Path) -> None:
    found = [evaluated(0, 100.0, origin="dense"), evaluated(1, 85.0, gmacs=0.009), evaluated(2, 60.0, gmacs=0.005)]
    for limits, expected in (((), [DENSE, "u2", "u1"]), (TWENTY_POINTS, [DENSE, "u1"])):
        config = study(limits=limits, confirm=ConfirmConfig(1, speed_seconds=0))
        assert [one.record.uid for one in wanted(config, tmp_path, found)] == expected


class Told:
    """A proposer that notes what it is told."""

    def __init__(self) -> None:
        self.excess: dict[str, dict[str, float]] = {}

    def add(self, uid: str, parameters: Mapping[str, Any]) -> None:
        pass

    def tell(self, uid: str, values: Sequence[float] | None, excess: Mapping[str, float]) -> None:
        self.excess[uid] = dict(excess)

    def draw(self, seed: int) -> dict[str, Any]:
        raise AssertionError


def test_the_sampler_is_told_again_when_the_dense_model_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Told] = []

    def new_proposer(state: SamplerState) -> Told:
        told.append(Told())
        return told[-1]

    monkeypatch.setattr(SamplerState, "_new_proposer", new_proposer)
    limits = (("gmacs", Limit(at_most="90%")), *TWENTY_POINTS)
    state, known = SamplerState(study(limits=limits)), dict[str, Record]()
    for record in (evaluated(1, 85.0), evaluated(2, 60.0), evaluated(0, 100.0, origin="dense"), evaluated(3, 70.0)):
        known[record.uid] = record
        state.begin(record)
        state.finish(record, record.evaluations[0], known)
        if record.number == 2:
            assert [list(excess) for excess in told[-1].excess.values()] == [["gmacs"], ["gmacs"]]
    assert len(told) == 2
    found = {uid: excess["top1"] for uid, excess in told[-1].excess.items()}
    assert found == pytest.approx({"u1": -5.0, "u2": 20.0, DENSE: -20.0, "u3": 10.0}, abs=1e-5)


def evaluate_dense_poorly(task: Task) -> Evaluation:
    """The dense model has 80 points at the first rung, 90 at the second, 100 at the last."""
    evaluation = fake_search.evaluate(task)
    if task.schedule.stages:
        return evaluation
    return replace(evaluation, metrics=(("top1", 80.0 + 10 * task.rung), *evaluation.metrics[:1]))


@pytest.mark.parametrize("trials", [3, 9, 15])
def test_a_search_that_is_killed_goes_on_as_it_would_have(
    trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(small_study(14), limits=(("top1", Limit(drop_at_most=10.0)), ("gmacs", Limit(at_most="95%"))))
    function = "test_relative_limits:evaluate_dense_poorly"

    def search(folder: Path) -> None:
        run_study(config, folder, storage=f"journal:{folder / 'study.log'}", evaluate=function)

    search(tmp_path / "whole")
    die_at(monkeypatch, "delivered", trials)
    with pytest.raises(Killed):
        search(tmp_path / "killed")
    monkeypatch.undo()
    search(tmp_path / "killed")
    whole, killed = (
        [(record.uid, [one.metrics for one in record.evaluations]) for record in records(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert whole == killed


def test_the_dense_model_goes_through_every_rung_and_judges_the_front(tmp_path: Path) -> None:
    config = replace(small_study(16), limits=(("top1", Limit(drop_at_most=1.5)),))
    run(config, tmp_path)
    found = records(tmp_path)
    dense = dense_record(found)
    assert dense is not None and dense.number == 0 and dense.uid == DENSE
    assert [evaluation.rung for evaluation in dense.evaluations] == list(range(len(RUNGS)))
    ((_, limit),) = limits_of(config, found)
    assert limit.at_least == pytest.approx(dense.evaluations[-1].value("top1") - 1.5)
    values = [record.evaluations[-1].value("top1") for record in found if record.rung_done == 2]
    assert any(limit.excess(value) > 0 for value in values) and any(limit.excess(value) <= 0 for value in values)


class DenseLast:
    """Three workers in this process; the dense model's result comes only after so many others."""

    count, description = 3, "three at once"

    def __init__(self, outbox: Path, after: int) -> None:
        self.outbox, self.left, self.tasks = outbox, after, list[Task]()

    def submit(self, task: Task) -> None:
        self.tasks.append(task)

    def wait(self, seconds: float) -> list[Any]:
        others = [task for task in self.tasks if task.uid != DENSE]
        self.left -= 1
        task = others[0] if others and self.left >= 0 else self.tasks[0]
        self.tasks.remove(task)
        return [(task, evaluate_into(self.outbox, fake_search.evaluate, task))]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_candidates_that_came_before_the_dense_model_are_judged_later(storage: str, tmp_path: Path) -> None:
    config = replace(study(10, "tpe"), limits=TWENTY_POINTS)
    url = None if storage == "sqlite" else f"journal:{tmp_path / 'study.log'}"
    run_study(config, tmp_path, storage=url, make_workers=lambda *_: DenseLast(tmp_path / "outbox", 5))
    reader = open_study_readonly(tmp_path) if url is None else open_study_readonly(storage=url)
    found = reader.records()
    reader.close()
    order = {record.uid: record.orders[0] for record in found}
    assert order[DENSE] == 5
    ((_, limit),) = limits_of(config, found)
    assert limit.at_least == pytest.approx(80.0)
    if url is None:  # Optuna's own constraints: a trial that was finished before has none
        trials = optuna.load_study(study_name="fake", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
        for trial in trials:
            assert ("top1" in trial.constraints) == (order[trial.user_attrs["uid"]] >= 5)


# --- a dense model that cannot be compared with ------------------------------------------------------------------


def fail_for_the_dense_model(task: Task) -> Evaluation:
    if task.schedule.stages or task.rung < 1:
        return fake_search.evaluate(task)
    return Evaluation(task.uid, "failed", task.rung, cause="oom", error="too large", traceback="Traceback: ...")


def test_a_dense_model_that_fails_ends_the_search(tmp_path: Path) -> None:
    config = replace(small_study(12), limits=TWENTY_POINTS)

    def search(folder: Path, config: StudyConfig = config, **options: Any) -> None:
        place, evaluate = f"journal:{folder / 'study.log'}", "test_relative_limits:fail_for_the_dense_model"
        run_study(config, folder, storage=place, evaluate=evaluate, **options)

    def no_workers(*arguments: Any) -> Any:
        raise AssertionError("nothing is evaluated in vain")

    said = r"limits.top1: relative to the dense model, whose evaluation failed at rung 1 \(oom\): too large. Possible"
    with pytest.raises(RunError, match=said):
        search(tmp_path)
    assert len(records(tmp_path)) < 12
    for searches in (True, False):  # again, and only to confirm
        with pytest.raises(RunError, match=said):
            search(tmp_path, make_workers=no_workers, search=searches)
    search(tmp_path / "other", replace(config, limits=(("top1", Limit(at_least=80.0)),)))
    assert len(records(tmp_path / "other")) == 12  # a limit that is a number does not need it


def evaluate_without_a_miss(task: Task) -> Evaluation:
    evaluation = fake_search.evaluate(task)
    return replace(evaluation, metrics=(*evaluation.metrics, ("target_miss", float(len(task.schedule.stages)))))


def test_there_is_no_share_of_nothing(tmp_path: Path) -> None:
    said = r"limits.target_miss: a share of the dense model's value, which is 0 at rung 0. Possible: .*drop_at_most"
    config = study(6, limits=(("target_miss", Limit(at_most="50%")),))
    with pytest.raises(RunError, match=said):
        run_study(config, tmp_path / "share", evaluate="test_relative_limits:evaluate_without_a_miss")
    drop = replace(config, limits=(("target_miss", Limit(drop_at_most=2.0)),))
    run_study(drop, tmp_path / "drop", evaluate="test_relative_limits:evaluate_without_a_miss")
    assert dense_problem(drop, dense_record(open_study_readonly(tmp_path / "drop").records())) is None


# --- looking at a study ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looked") / "fake"
    run(study(30, limits=(("gmacs", Limit(at_most="95%")), ("top1", Limit(drop_at_most=80.0)))), folder, journal=False)
    return folder


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_front_shows_limits_and_what_loses_little(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything, within = rows(capsys, "front", str(folder)), rows(capsys, "front", str(folder), "--within", "top1=30")
    assert within == [row for row in everything if row["metrics"]["top1"] >= 70 - 1e-6]
    assert 0 < len(within) < len(everything)
    for verb in ("front", "status"):
        assert main([verb, str(folder)]) == 0
        said = " ".join(capsys.readouterr().out.replace("limit:", "limit").split())
        assert "limit gmacs at most 95 % = 0.012191" in said
        assert "limit top1 at most 80 worse than dense = at least 20" in said
    assert main(["front", str(folder), "--within", "top1=0"]) == 0
    assert "no candidate has" in capsys.readouterr().out  # the dense model itself is over 95 % of its gmacs


def test_export_takes_the_cheapest_within_a_drop(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cheapest = rows(capsys, "front", str(folder), "--within", "top1=30")[0]["trial"]
    out = str(tmp_path / "best.yaml")
    assert main(["export", str(folder), "--fastest-within", "top1=30", "-o", out]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"Trial {cheapest}:") and "note: the best gmacs with top1 at least 70" in said.err
    assert main(["export", str(folder), "--at-most", "gmacs=70%", "-o", out]) == 0
    share = capsys.readouterr().out
    assert main(["export", str(folder), "--at-most", f"gmacs={0.7 * DENSE_GMACS}", "-o", out]) == 0
    assert capsys.readouterr().out == share
    assert main(["export", str(folder), "--at-least", "top1=60 %", "--at-most", "gmacs=0.011", "-o", out]) == 0
    assert float(re.findall(r"top1 ([\d.]+)", capsys.readouterr().out)[0]) >= 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fastest-within", "gmacs=1"], "bound on gmacs: gmacs is computed from the schedule, and a drop is for"),
        (
            ["--fastest-within", "top5=1"],
            "relative to the dense model, but this study did not measure top5",
        ),
        (["--fastest-within", "topp1=1"], 'a metric of prunesearch. Did you mean "top1"? Bound one.'),
        (["--fastest-within", "top1"], "--fastest-within top1: possible: metric=number from 0. Write for example"),
        (["--fastest-within", "top1=1%"], "--fastest-within top1=1%: possible: metric=number from 0."),
        (["--fastest-within", "top1=-1"], "--fastest-within top1=-1: possible: metric=number from 0."),
        (["--at-most", "gmacs=0%"], "--at-most gmacs=0%: possible: metric=number or metric=share."),
        (["--at-most", "gmacs=-70%"], "gmacs=3.0 or gmacs=70%."),
        (["--at-least", "loss=70%"], "this study did not measure loss of the dense model. Possible: what is known"),
        (["--fastest-within", "top1=0"], "and top1 at least 100"),
    ],
)
def test_mistakes_when_asking(
    arguments: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), *arguments, "-o", str(tmp_path / "x.yaml")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()


def test_trial_and_fastest_within_do_not_go_together(folder: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(folder), "--trial", "1", "--fastest-within", "top1=1"])
    assert caught.value.code == 2


def asked(limits: WrittenLimits, found: Sequence[Record], config: StudyConfig | None = None) -> Limits:
    return asked_limits(limits, config or study(), found)


def test_asking_before_the_dense_model_is_known() -> None:
    alone = [evaluated(1, 80.0)]
    with pytest.raises(StudyError, match=r"the dense model has no result yet. Possible: .*Give a number"):
        asked(TWENTY_POINTS, alone)
    zero = [evaluated(0, 0.0, origin="dense"), *alone]
    with pytest.raises(StudyError, match=r"bound on top1: 70% of the dense model's value, which is 0. Possible"):
        asked([("top1", Limit(at_most="70%"))], zero)
    assert asked([("top1", Limit(at_most=70.0))], alone) == (("top1", AbsoluteLimit(at_most=70.0)),)


def test_a_metric_of_a_plug_in_that_is_not_imported_is_not_judged_in_silence() -> None:
    config = limited(theirs=Limit(drop_at_most=1.0))
    evaluation = Evaluation(DENSE, "complete", metrics=(("top1", 1.0), ("gmacs", 1.0), ("theirs", 5.0)))
    found = [replace(evaluated(0, 1.0, origin="dense"), evaluations=(evaluation,))]
    (line,) = limit_lines(config, found)
    assert "theirs at most 1 worse than dense (not judged, as nothing says which way of theirs is better" in line
    shares = replace(config, limits=(("theirs", Limit(at_most="50%")),))  # needs no direction
    assert limit_lines(shares, found) == ["theirs at most 50 % = 2.5"]
    with pytest.raises(StudyError, match="no metric of prunesearch or an imported plug-in has this name"):
        asked(config.limits, found)
