"""Promotions, on hand-made fronts and compared with moocore; rank correlation between rungs."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from fake_search import RUNGS, study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from scipy.stats import kendalltau

from prunesearch.config import BlockSpace, Budget, Objective, SpaceConfig
from prunesearch.evaluate.limits import AbsoluteLimit, total_excess
from prunesearch.evaluate.task import Evaluation
from prunesearch.front import dense_of, front, highest_rung, hypervolume, nondominated_ranks
from prunesearch.record import Record, with_evaluation
from prunesearch.schedule import Schedule
from prunesearch.search.agreement import agreements, kendall_tau
from prunesearch.search.problems import study_problems
from prunesearch.search.rungs import Result, bands_of, next_of_net, promotion
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.storage import storage_url
from prunesearch.study.store import open_store

STAIRS = [(1.0, 9.0), (2.0, 6.0), (3.0, 4.0), (6.0, 2.0), (9.0, 1.0)]
"""A front: error and cost. (3, 4) is the best compromise."""
BEHIND = [(5.0, 9.5), (7.0, 8.0), (9.5, 7.0), (9.5, 9.5)]


def next_promotion(results: Sequence[Result], rungs: int, one_in: int, cost: int | None) -> Result | None:
    """The next promotion, from the highest rung that has one; None if there is none."""
    for rung in reversed(range(rungs - 1)):
        found = promotion([one for one in results if one.rung == rung], one_in, cost)
        if found is not None:
            return found
    return None


def finished(losses: Sequence[tuple[float, ...]], rung: int = 0) -> list[Result]:
    return [Result(f"{number:02d}", rung, values) for number, values in enumerate(losses)]


def promoted(results: Sequence[Result], rungs: int = 2, one_in: int = 3, cost: int | None = None) -> list[str]:
    """Uids and rungs of all promotions in order, without new results in between."""
    found, results = [], list(results)
    while (best := next_promotion(results, rungs, one_in, cost)) is not None:
        assert not best.is_promoted
        results[results.index(best)] = replace(best, is_promoted=True)
        found.append(f"{best.uid}.{best.rung}")
    return found


def test_the_best_third_goes_on_the_front_first_and_spread_along_it() -> None:
    results = finished(STAIRS + BEHIND)
    assert promoted(results) == ["02.0", "04.0", "00.0"]  # 3 of 9: the compromise, then the two ends
    assert promoted(results, one_in=2) == ["02.0", "04.0", "00.0", "03.0"]
    assert promoted(list(reversed(results))) == promoted(results)


def test_nobody_goes_on_from_the_last_rung_and_the_highest_one_is_asked_first() -> None:
    results = finished(STAIRS + BEHIND) + [replace(one, rung=1) for one in finished(STAIRS + BEHIND)]
    assert promoted(results, rungs=1) == []
    assert promoted(results, rungs=2) == ["02.0", "04.0", "00.0"]
    assert promoted(results, rungs=3)[:3] == ["02.1", "04.1", "00.1"]


def test_the_first_arrivals_do_not_all_climb() -> None:
    results = finished(STAIRS)
    assert promoted(results, one_in=3) == []  # 5 results, but 6 are needed
    assert promoted([*results, Result("zz", 0, (9.0, 9.0))]) == ["02.0", "04.0"]


def test_those_within_the_limits_come_first_then_those_that_break_them_least() -> None:
    results = finished(STAIRS + BEHIND)
    results[:5] = [replace(one, excess=excess) for one, excess in zip(results, (0.5, 0.1, 0.4, 0.3, 0.2), strict=False)]
    assert promoted(results, one_in=2) == ["06.0", "05.0", "07.0", "08.0"]  # all that are within the limits
    all_over = [replace(one, excess=1.0 + int(one.uid)) for one in results]
    assert promoted(all_over) == ["00.0", "01.0", "02.0"]


def test_equal_losses_are_equal_and_ties_go_by_uid() -> None:
    same = finished([(1.0, 1.0)] * 6)
    assert promoted(same) == ["00.0", "01.0"]
    assert promoted(random.Random(0).sample(same, 6)) == ["00.0", "01.0"]
    twice = finished([*STAIRS, *STAIRS, (9.5, 9.5)])
    assert promoted(twice) == ["02.0", "04.0", "00.0"]  # duplicates come last in their front


def test_with_one_objective_it_is_an_order() -> None:
    results = finished([(float(value),) for value in (5, 3, 8, 1, 9, 2, 7)])
    assert promoted(results) == ["03.0", "05.0"]
    assert promoted(results, cost=0) == ["03.0", "05.0", "00.0", "06.0"]  # 5 and 7: from the other thirds


def test_numbers_that_are_not_finite_take_no_part() -> None:
    results = finished(STAIRS + BEHIND)
    broken = [
        Result("aa", 0, (float("nan"), 0.0)),
        Result("ab", 0, (0.0, float("-inf"))),
        Result("ac", 0, (1e300, 0.5)),
    ]
    assert promoted(results + broken[:2]) == promoted(results)
    assert "ac.0" in promoted(results + broken)
    assert promoted(broken * 3) == []


def test_anchors_go_on_at_once_whatever_they_are_worth() -> None:
    anchor = Result("zz", 0, (99.0, 99.0), excess=5.0, is_start=True)
    assert promoted([anchor]) == ["zz.0"]
    assert promoted([*finished(STAIRS + BEHIND), anchor]) == ["zz.0", "02.0", "04.0", "00.0"]


def test_each_third_of_the_costs_sends_somebody() -> None:
    dear = [(0.5, 10.0), (0.6, 9.9), (0.7, 9.8), (0.8, 9.7), (0.9, 9.6), (0.95, 9.5)]  # all of them accurate
    middle, cheap = [(6.0, 5.0), (5.0, 5.1)], [(8.0, 1.0), (7.0, 1.2)]
    results = finished(dear + middle + cheap)
    assert bands_of([losses[1] for losses in dear + middle + cheap]) == [2] * 6 + [1] * 2 + [0] * 2
    went = {uid[:2] for uid in promoted(results, one_in=5, cost=1)}
    for band in ({"00", "01", "02", "03", "04", "05"}, {"06", "07"}, {"08", "09"}):
        assert went & band
    over = [replace(one, excess=0.1) if one.losses[1] == 1.0 or one.losses[1] == 1.2 else one for one in results]
    assert not {uid[:2] for uid in promoted(over, one_in=5, cost=1)} & {"08", "09"}  # they break a limit
    assert bands_of([]) == [] and bands_of([2.0, 2.0]) == [0, 0]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_and_hypervolume_agree_with_moocore(objectives: int, seed: int) -> None:
    moocore = pytest.importorskip("moocore")
    draw = np.random.default_rng(seed)
    for losses in (draw.random((120, objectives)), draw.integers(0, 5, (120, objectives)).astype(float)):
        found = nondominated_ranks(losses)
        if objectives == 1:  # moocore needs two objectives
            assert found.tolist() == np.unique(losses, return_inverse=True)[1].reshape(-1).tolist()
            continue
        assert found.tolist() == moocore.pareto_rank(losses).tolist()
        reference = np.full(objectives, losses.max() * 0.9)
        few = losses[:40]
        assert hypervolume(few, reference) == pytest.approx(moocore.hypervolume(few, ref=reference), rel=1e-9)


def test_every_beginning_of_a_net_is_spread() -> None:
    angle = np.linspace(0, np.pi / 2, 41)
    front_of_41 = np.stack([1 - np.sin(angle), 100 * (1 - np.cos(angle))], axis=1)  # scales do not matter
    order: list[int] = []
    for _ in range(41):
        order.append(next_of_net(front_of_41, np.isin(np.arange(41), order)))
    assert sorted(order) == list(range(41))
    assert order[:3] == [20, 0, 40]
    for count in (5, 9, 17):
        gaps = np.diff(sorted(order[:count]))
        assert gaps.max() <= 2 * gaps.min() + 1


def test_a_whole_search_narrows_down_and_finds_the_front() -> None:
    """81 candidates arrive in random order; about a third is promoted each time, with the best of the first rung."""
    draw = random.Random(0)
    cost = [draw.uniform(0.3, 1.0) for _ in range(81)]
    results: list[Result] = []
    for number, value in enumerate(cost):
        results.append(Result(f"{number:02d}", 0, ((1 - value) ** 2 + draw.random() * 0.3, value)))
        while (best := next_promotion(results, 3, 3, 1)) is not None:
            results[results.index(best)] = replace(best, is_promoted=True)
            results.append(replace(best, rung=best.rung + 1))
    counts = [sum(one.rung == rung for one in results) for rung in range(3)]
    assert counts[0] == 81 and 27 <= counts[1] <= 45 and 9 <= counts[2] <= 25
    lowest = np.array([one.losses for one in results if one.rung == 0])
    top = np.array([one.losses for one in results if one.rung == 2])
    reference = np.array([1.1, 1.1])
    assert hypervolume(top, reference) > 0.95 * hypervolume(lowest, reference)


# --- records -----------------------------------------------------------------------------------------------------


def record(number: int, *top1: float, gmacs: float = 1.0, origin: str = "sampler") -> Record:
    """A candidate with one top-1 value per rung."""
    made = Record(number, f"{number:02d}", Schedule(), "running", origin, 0)
    for rung, value in enumerate(top1):
        evaluation = Evaluation(made.uid, "complete", rung, metrics=(("gmacs", gmacs), ("top1", value)))
        made = with_evaluation(replace(made, rung=rung), evaluation, order=10 * number + rung, last_rung=2)
    return made


CONFIG = study(rungs=RUNGS)
OBJECTIVES = CONFIG.objectives


def test_a_record_grows_by_evaluations() -> None:
    grown = record(3, 50.0, 60.0)
    assert (grown.state, grown.rung, grown.rung_done, grown.orders) == ("paused", 1, 1, (30, 31))
    assert grown.at(0) and grown.at(1) and not grown.at(2)
    again = with_evaluation(grown, grown.evaluations[1], order=99, last_rung=2)
    assert again == grown  # also after a kill between two commits
    assert record(3, 50.0, 60.0, 70.0).state == "complete"
    failure = with_evaluation(replace(grown, rung=2), Evaluation("03", "failed", 2, cause="oom"), 40, 2)
    assert failure.state == "failed" and failure.at(2) is None and failure.at(1) is not None


def test_the_front_compares_equal_budgets() -> None:
    dense = record(0, 99.0, origin="dense", gmacs=9.0)
    low = [record(1, 90.0, gmacs=2.0), record(2, 80.0, gmacs=1.0)]
    assert [one.number for one in front([dense, *low], OBJECTIVES)] == [2, 1, 0]
    higher = [record(1, 90.0, 70.0, gmacs=2.0), record(2, 80.0, gmacs=1.0)]
    assert [one.number for one in front([dense, *higher], OBJECTIVES)] == [1]  # 2 and dense are not at rung 1 yet
    assert highest_rung([dense, *higher]) == 1 and dense_of([dense, *higher]) is None
    broken = with_evaluation(replace(higher[0], rung=2), Evaluation("01", "failed", 2, cause="nan"), 9, 2)
    assert [one.number for one in front([dense, broken, higher[1]], OBJECTIVES)] == [2, 0]
    assert highest_rung([]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_scipys(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for pairs in (draw.random((30, 2)), draw.integers(0, 4, (30, 2)), draw.integers(0, 3, (3, 2))):
        expected = kendalltau(*pairs.T).statistic
        found = kendall_tau([tuple(pair) for pair in pairs.tolist()])
        assert found is None if np.isnan(expected) else found == pytest.approx(expected)
    assert kendall_tau([(1.0, 1.0), (2.0, 2.0)]) is None
    assert kendall_tau([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) is None


def test_agreement_overall_and_within_thirds_of_the_cost() -> None:
    """Three groups by cost. Expensive ones are better at both rungs, but within a group the order is reversed."""
    groups = [[record(10 * g + i, 10.0 * g + i, 10.0 * g - i, gmacs=float(g)) for i in range(4)] for g in range(3)]
    lower, upper = agreements([*itertools.chain(*groups), record(99, 1.0)], CONFIG.objectives, len(CONFIG.rungs))
    assert (lower.metric, lower.rung, lower.pairs) == ("top1", 0, 12)  # gmacs is computed, so it has no correlation
    assert lower.bands == pytest.approx((-1.0, -1.0, -1.0))
    assert lower.tau == pytest.approx((48 - 18) / 66) and lower.is_low
    assert (upper.rung, upper.pairs, upper.tau, upper.is_low) == (1, 0, None, False)
    assert not agreements(groups[0], CONFIG.objectives, len(CONFIG.rungs))[0].is_low  # four pairs are too few


def test_limits_add_up_as_shares_of_their_bounds() -> None:
    limits = (("gmacs", AbsoluteLimit(at_most=2.0)), ("top1", AbsoluteLimit(at_least=50.0)))
    assert total_excess(limits, {"gmacs": 1.0, "top1": 60.0}) == 0
    assert total_excess(limits, {"gmacs": 3.0, "top1": 40.0}) == pytest.approx(0.5 + 0.2)
    assert total_excess(limits, {"gmacs": 1.0, "top1": 40.0}) == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_candidate_waits_in_the_storage_and_is_promoted(tmp_path: Path, kind: str) -> None:
    url = storage_url(tmp_path) if kind == "sqlite" else f"journal:{tmp_path / 'study.log'}"
    store = open_store(CONFIG, url)
    first, second = (store.begin(replace(record(number), number=-1), {}) for number in (0, 1))
    low, high = record(0, 50.0, 60.0, 70.0).evaluations[:2]
    waiting = store.finish(first, low)
    other = store.finish(second, replace(low, uid="01"))
    assert (waiting.state, waiting.orders, other.orders) == ("paused", (0,), (1,))
    assert open_study_readonly(storage=url).records() == [waiting, other]
    running = replace(waiting, state="running", rung=1)
    store.promote(running)
    assert store.records() == [running, other]
    store.close()
    store = open_store(CONFIG, url)  # another process
    assert store.results == 2 and store.begin_again(0) == 1
    again = store.finish(running, high)
    assert (again.orders, again.rung, again.state) == ((0, 2), 1, "paused")
    top = replace(again, state="running", rung=2)
    store.promote(top)
    done = store.finish(top, replace(high, rung=2))
    assert store.records() == [done, other] and done.state == "complete"
    store.close()
    study_of_optuna = optuna.load_study(study_name="fake", storage=_storage(url))
    assert [trial.state.name for trial in study_of_optuna.trials] == ["COMPLETE", "WAITING"]
    assert study_of_optuna.trials[0].values == [60.0, 1.0]
    assert study_of_optuna.trials[0].user_attrs["attempts"] == [1, 2, 1]
    assert study_of_optuna.trials[0].user_attrs["rung:1"]["order"] == 2
    assert [trial.number for trial in study_of_optuna.best_trials] == [0]  # of equal budgets only


def _storage(url: str) -> Any:
    if url.startswith("journal:"):
        return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    return url


# --- study files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rungs", "says"),
    [
        ((), "rungs: there is none"),
        ((Budget(),), r"rungs\[0\]: neither images nor seconds"),
        ((Budget(images=5), Budget(images=5)), "rungs: 5, 5 images do not ascend"),
        ((Budget(images=5), Budget(images=0)), "rungs: 5, 0 images do not ascend"),
        ((Budget(seconds=5.0), Budget(images=9)), r"rungs\[0\]: 5 seconds, but"),
        ((Budget(images=5), Budget()), r"rungs\[1\]: no images, but"),
    ],
)
def test_rungs_that_make_no_sense_are_refused(rungs: tuple[Budget, ...], says: str) -> None:
    (problem,) = study_problems(study(rungs=rungs))
    assert re.search(says, problem) and "ossible" in problem


def test_what_must_be_trained_is_not_judged_untrained() -> None:
    learned = SpaceConfig(blocks=(BlockSpace(1, at=("pre",), score=("predictor",)),))
    (problem,) = study_problems(study(space=learned, rungs=RUNGS))
    assert "rungs[0]: 0 images, but predictor must be trained" in problem
    assert study_problems(study(space=learned, rungs=RUNGS[1:])) == []
    assert study_problems(study(space=learned, rungs=RUNGS[:1])) == []  # with one budget all are equally untrained
    assert study_problems(study(rungs=RUNGS)) == []
    assert study_problems(study(rungs=(Budget(seconds=2.0),), objectives=(Objective("top1", "maximize"),))) == []
