"""Front, hypervolume, knee and the best candidate within bounds, compared with brute force."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from prunesearch.config import Objective
from prunesearch.errors import StudyError
from prunesearch.evaluate.limits import AbsoluteLimit, Limits
from prunesearch.evaluate.task import Evaluation
from prunesearch.front import (
    best,
    cheapest,
    dense_of,
    front,
    front_rows,
    hypervolume,
    knee,
    normalised_hypervolume,
    points,
    reference_point,
)
from prunesearch.record import Record, State
from prunesearch.schedule import Schedule, Stage

TOP1, GMACS = Objective("top1", "maximize"), Objective("gmacs", "minimize")
FAST = Objective("throughput", "maximize")


def record(number: int, state: State = "complete", origin: str = "sampler", **metrics: float) -> Record:
    status = "failed" if state == "failed" else "complete"
    evaluation = Evaluation(f"u{number}", status, metrics=tuple(metrics.items()), tokens=(65, 40), images=10)
    evaluations = () if state == "running" else (evaluation,)
    return Record(number, f"u{number}", Schedule((Stage(1, keep=0.7),)), state, origin, 0, evaluations)


def bounds(**given: float) -> Limits:
    """bounds(gmacs_at_most=3.0) is a limit on gmacs."""
    named = [(*name.split("_at_"), value) for name, value in given.items()]
    return [(metric, AbsoluteLimit(**{f"at_{word}": value})) for metric, word, value in named]


def numbers(records: list[Record]) -> list[int]:
    return [one.number for one in records]


@pytest.mark.parametrize("objectives", [(TOP1,), (TOP1, GMACS), (TOP1, GMACS, FAST), (GMACS, FAST)])
@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_comparing_all_pairs_gives(objectives: tuple[Objective, ...], seed: int) -> None:
    draw = np.random.default_rng(seed)
    records = [  # few distinct values, so that there are many ties
        record(n, top1=float(a), gmacs=float(b), throughput=float(c))
        for n, (a, b, c) in enumerate(draw.integers(0, 6, (40, 3)))
    ]
    values = points(records, objectives)
    expected = {
        i
        for i in range(40)
        if not any(
            (values[j] <= values[i]).all() and ((values[j] < values[i]).any() or j < i) for j in range(40) if j != i
        )
    }
    shuffled = [records[i] for i in draw.permutation(40)]
    found = front(shuffled, objectives)
    assert set(numbers(found)) == expected
    column = 1 if objectives[0] == TOP1 and len(objectives) > 1 else 0
    assert list(points(found, objectives)[:, column]) == sorted(points(found, objectives)[:, column])


def test_front_takes_only_complete_finite_candidates_within_limits() -> None:
    records = [
        record(0, top1=99.0, gmacs=9.0),
        record(1, top1=90.0, gmacs=5.0),
        record(2, top1=80.0, gmacs=1.0),
        record(3, "running"),
        record(4, "failed", top1=99.0, gmacs=0.1),
        record(5, top1=float("nan"), gmacs=0.1),
        record(6, gmacs=0.1),
        record(7, top1=85.0, gmacs=2.0, loss=1.0),
    ]
    assert numbers(front(records, (TOP1, GMACS))) == [2, 7, 1, 0]
    assert numbers(front(records, (TOP1, GMACS), (("gmacs", AbsoluteLimit(at_most=5.0)),))) == [2, 7, 1]
    assert numbers(front(records, (TOP1, GMACS), (("gmacs", AbsoluteLimit(at_least=2.0, at_most=6.0)),))) == [7, 1]
    assert numbers(front(records, (TOP1, GMACS), (("loss", AbsoluteLimit(at_most=2.0)),))) == [
        7
    ]  # not measured is not within
    assert front([], (TOP1, GMACS)) == []


def test_front_without_a_minimized_objective_goes_by_the_last_one_best_first() -> None:
    records = [record(0, top1=90.0, throughput=1.0), record(1, top1=80.0, throughput=3.0)]
    assert numbers(front(records, (TOP1, FAST))) == [1, 0]


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume_is_that_of_the_union_of_boxes(dimensions: int) -> None:
    draw = np.random.default_rng(dimensions)
    for count in range(7):
        values = draw.integers(0, 6, (count, dimensions)).astype(float)  # ties, and points at or beyond the reference
        reference = np.full(dimensions, 5.0)
        cells = itertools.product(range(5), repeat=dimensions)
        expected = sum(any((row <= cell).all() for row in values) for cell in cells)
        assert hypervolume(values, reference) == pytest.approx(expected)


def test_hypervolume_of_real_numbers_by_inclusion_and_exclusion() -> None:
    values = np.random.default_rng(3).random((7, 3)) * 1.2
    inside = np.minimum(values, 1.0)
    expected = 0.0
    for size in range(1, 8):
        for chosen in itertools.combinations(inside, size):
            expected -= (-1) ** size * float(np.prod(1.0 - np.max(chosen, axis=0)))
    assert hypervolume(values, np.ones(3)) == pytest.approx(expected)


def test_hypervolume_is_measured_from_the_dense_model() -> None:
    dense = record(0, origin="dense", top1=80.0, gmacs=10.0)
    free = record(1, top1=80.0, gmacs=0.0)
    half = record(2, top1=60.0, gmacs=5.0)
    useless = record(3, top1=30.0, gmacs=0.0)
    objectives = (TOP1, GMACS)
    assert list(reference_point(dense, objectives)) == [-40.0, 11.0]
    assert dense_of([free, dense]) is dense
    assert normalised_hypervolume([dense], objectives, dense) == pytest.approx(40 * 1 / (40 * 11))
    assert normalised_hypervolume([dense, half], objectives, dense) == pytest.approx((40 * 1 + 20 * 5) / (40 * 11))
    assert normalised_hypervolume([free, half], objectives, dense) == pytest.approx(1.0)
    assert normalised_hypervolume([useless], objectives, dense) == 0.0
    limits = (("gmacs", AbsoluteLimit(at_most=6.0)),)
    assert normalised_hypervolume([dense, half], objectives, dense, limits) == pytest.approx(20 * 6 / (40 * 11))


def test_there_is_no_hypervolume_without_a_dense_result() -> None:
    running = record(0, "running", origin="dense")
    failed = record(0, "failed", origin="dense", top1=1.0, gmacs=1.0)
    zero = record(0, origin="dense", top1=0.0, gmacs=1.0)
    assert dense_of([running, record(1, top1=1.0)]) is None
    assert dense_of([failed]) is None
    for dense in (None, failed, zero):
        assert normalised_hypervolume([record(1, top1=1.0, gmacs=1.0)], (TOP1, GMACS), dense) is None


def test_knee_is_farthest_below_the_chord() -> None:
    objectives = (TOP1, GMACS)
    bent = [record(n, top1=top1, gmacs=g) for n, (top1, g) in enumerate([(50, 1), (88, 2), (90, 3), (91, 9), (92, 10)])]

    def distance(one: Record) -> float:
        a, b, p = ((values["gmacs"] / 9, values["top1"] / 42) for values in map(dict, (
            bent[0].evaluations[0].metrics, bent[-1].evaluations[0].metrics, one.evaluations[0].metrics)))  # fmt: skip
        return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])

    assert knee(bent, objectives) is max(bent, key=distance) is bent[1]
    assert knee(bent[:1], objectives) is bent[0]
    assert knee([bent[0], bent[4]], objectives) is bent[4]  # of two, the better one by the first objective
    line = [record(n, top1=70.0 + 10 * n, gmacs=1.0 + n) for n in range(3)]
    assert knee(line, objectives) is line[2]
    with pytest.raises(StudyError, match=r"empty.*Possible.*Run"):
        knee([], objectives)


def test_best_within_bounds() -> None:
    objectives = (TOP1, GMACS)
    records = [
        record(0, origin="dense", top1=97.0, gmacs=12.0, latency_ms=4.0),
        record(1, top1=95.0, gmacs=9.0, latency_ms=3.0),
        record(2, top1=95.0, gmacs=8.0, latency_ms=3.5),
        record(3, top1=95.0, gmacs=8.0),
        record(4, top1=90.0, gmacs=5.0, latency_ms=2.0),
    ]
    assert best(records, objectives, bounds(gmacs_at_most=10.0)).number == 2  # ties: cheaper, then earlier
    assert best(records, objectives, bounds(top1_at_least=94.0)).number == 2  # with a bound on top1: the cheapest
    assert best(records, objectives, bounds(latency_ms_at_most=3.2)).number == 1  # any metric can be bounded
    assert best(records, objectives, bounds(gmacs_at_most=9.0, top1_at_least=90.0)).number == 2  # all bounded: by top1
    assert best(records, objectives, bounds()).number == 0
    assert best(records, objectives, bounds(), (("gmacs", AbsoluteLimit(at_most=6.0)),)).number == 4


def test_cheapest_within_bounds() -> None:
    records = [
        record(0, origin="dense", top1=97.0, gmacs=12.0, throughput=10.0),
        record(1, top1=95.0, gmacs=8.0, throughput=20.0),
        record(2, top1=94.0, gmacs=8.0, throughput=20.0),
        record(3, top1=90.0, gmacs=5.0, throughput=40.0),
    ]
    for objectives, asked, number, by in (
        ((TOP1, GMACS), bounds(top1_at_least=94.0), 1, GMACS),  # ties: by the other objectives
        ((TOP1, GMACS), bounds(top1_at_least=96.0), 0, GMACS),
        ((TOP1, FAST), bounds(top1_at_least=94.0), 1, FAST),
        ((FAST, TOP1), bounds(top1_at_least=90.0), 3, FAST),  # never by what is bounded
        ((TOP1, GMACS), bounds(gmacs_at_most=9.0), 1, TOP1),
        ((TOP1, FAST, GMACS), bounds(top1_at_least=94.0), 1, GMACS),
    ):
        found, cost = cheapest(records, objectives, asked)
        assert (found.number, cost) == (number, by)
    with pytest.raises(StudyError, match=r"bound on top1: with it no objective .*Possible: .*Keep fewer"):
        cheapest(records, (TOP1,), bounds(top1_at_least=94.0))
    with pytest.raises(StudyError, match="no candidate has top1 at least 99"):
        cheapest(records, (TOP1, GMACS), bounds(top1_at_least=99.0))
    found, cost = cheapest(records, (TOP1, GMACS), bounds(top1_at_least=80.0), bounds(gmacs_at_least=6.0))
    assert (found.number, cost) == (1, GMACS)  # a further bound may be on the cost itself


def test_best_names_the_nearest_when_there_is_none() -> None:
    records = [record(0, top1=97.0, gmacs=12.0), record(1, top1=90.0, gmacs=5.0)]
    with pytest.raises(StudyError, match=r"gmacs at most 3 .*nearest is trial 1 with gmacs 5\. Loosen"):
        best(records, (TOP1, GMACS), bounds(gmacs_at_most=3.0))
    with pytest.raises(StudyError, match=r"gmacs at most 6 and top1 at least 96 .*trial 1 with gmacs 5, top1 90"):
        best(records, (TOP1, GMACS), bounds(gmacs_at_most=6.0, top1_at_least=96.0))
    with pytest.raises(StudyError, match=r"latency_ms: this study did not measure it. Possible: gmacs, top1"):
        best(records, (TOP1, GMACS), bounds(latency_ms_at_most=6.0))
    with pytest.raises(StudyError, match="empty"):
        best([record(0, "running")], (TOP1, GMACS), bounds(gmacs_at_most=3.0))


def test_rows_are_plain_and_whole() -> None:
    (row,) = front_rows([record(3, gmacs=5.0, top1=90.0, loss=0.5)], (TOP1, GMACS))
    assert json.loads(json.dumps(row)) == {
        "trial": 3,
        "uid": "u3",
        "origin": "sampler",
        "metrics": {"top1": 90.0, "gmacs": 5.0, "loss": 0.5},
        "tokens": [65, 40],
        "finetuned_images": 10,
        "schedule": {"stages": [{"block": 1, "keep": 0.7, "score": "class_attention"}]},
    }
    assert list(row["metrics"]) == ["top1", "gmacs", "loss"]
