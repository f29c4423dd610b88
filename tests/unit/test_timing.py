"""Timing in turns, and the fit of what a stage takes: noise that only adds time must not move the result."""

from __future__ import annotations

import numpy as np
import pytest

from prunesearch.device import timing
from prunesearch.device.measure import non_negative_fit
from prunesearch.device.timing import FEWEST_ROUNDS, in_turns, ratios_in_turns


class Machine:
    """A clock that work advances. slow: how many times slower the machine is, by time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls, self.random = 0.0, [], np.random.default_rng(0)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        self.slow = lambda: 1.0

    def work(self, name: str, seconds: float) -> object:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * self.slow()

        return run


def test_every_piece_is_visited_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.slow = lambda: 1 + machine.random.random() / 10
    found = in_turns({name: machine.work(name, 0.05) for name in "abc"}, seconds=1.0)
    visits = machine.calls[18::2]  # the first six calls of each size it up; each visit begins with a call to warm up
    rounds = [visits[start : start + 3] for start in range(0, len(visits), 3)]
    assert len(rounds) >= FEWEST_ROUNDS and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1  # in different orders
    assert {name: round(value.seconds, 2) for name, value in found.items()} == {"a": 0.05, "b": 0.05, "c": 0.05}


def test_drift_hits_all_alike_and_neighbours_only_add_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine becomes three times slower, and one visit in four is disturbed."""
    machine = Machine(monkeypatch)
    disturbed = lambda: 1 + 4 * machine.random.random() if machine.random.random() < 0.25 else 1.0  # noqa: E731
    machine.slow = lambda: (1 + machine.now / 10) * disturbed()
    found = in_turns({"short": machine.work("short", 0.03), "long": machine.work("long", 0.09)}, seconds=20.0)
    assert found["long"].seconds / found["short"].seconds == pytest.approx(3.0, rel=0.05)
    assert found["short"].seconds < 0.03 * 2.2  # of the quieter rounds, not of the slow end


def test_what_takes_long_is_visited_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.slow = lambda: 1 + machine.random.random() / 10
    parts = {name: machine.work(name, 0.03) for name in "abcd"}
    in_turns({"whole": machine.work("whole", 1.0), **parts}, seconds=30.0)
    assert machine.calls.count("whole") == 2 + FEWEST_ROUNDS and machine.calls.count("a") > 50
    in_turns({name: machine.work(name, 1.0) for name in ("again", "another")}, seconds=60.0, long=2.0)
    assert machine.calls.count("again") > 2 + FEWEST_ROUNDS


def test_ratios_are_of_one_round_so_that_drift_divides_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine becomes slower from round to round, by far more than the models differ."""
    machine = Machine(monkeypatch)
    machine.slow = lambda: 2.0 ** (machine.now / 40) * (1 + machine.random.random() / 10)
    work = {name: [machine.work(name, seconds)] for name, seconds in (("dense", 0.6), ("a", 0.4), ("b", 0.6))}
    found = ratios_in_turns(work, "dense", seconds=60.0)
    assert found["dense"][:3] == (1.0, 1.0, 1.0)
    assert found["a"].median == pytest.approx(1.5, rel=0.1) and found["b"].median == pytest.approx(1.0, rel=0.1)
    for ratio in found.values():
        assert ratio.low <= ratio.median <= ratio.high and ratio.rounds > FEWEST_ROUNDS  # though they take long
    assert machine.calls.count("dense") == 2 + found["dense"].rounds  # two calls size it up


def test_the_spread_of_ratios_is_that_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    times = {"dense": 2.0, "a": 1.0}

    def run(name: str) -> None:
        machine.now += times[name] * (next(slow) if name == "a" else 1.0)

    slow = iter([1.0, 1.0, *(1.0, 2.0, 0.5, 4.0, 1.0)])  # two calls size it up
    work = {name: [lambda name=name: run(name)] for name in times}
    ratio = ratios_in_turns(work, "dense", seconds=0.1)["a"]
    assert (ratio.low, ratio.median, ratio.high, ratio.rounds) == (1.0, 2.0, 2.0, 5) and ratio.seconds == 1.0


def test_models_of_one_round_run_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    work = {name: [machine.work(f"{name}{place}", 1.0) for place in range(3)] for name in ("dense", "a")}
    ratios_in_turns(work, "dense", seconds=0.1)
    visits = machine.calls[-2 * FEWEST_ROUNDS :]
    rounds = [sorted(visits[start : start + 2]) for start in range(0, len(visits), 2)]
    assert rounds == [[f"a{place}", f"dense{place}"] for place in (0, 1, 2, 0, 1)]


def test_measuring_ends_early_when_all_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    in_turns({"a": machine.work("a", 0.1)}, seconds=1000.0)
    assert machine.now < 2


def test_the_fit_finds_weights_and_none_is_negative() -> None:
    rows = np.array([[1.0, n, k, n * k] for n, k in ((100, 90), (100, 60), (40, 36), (40, 20))])
    weights, error = non_negative_fit(rows, rows @ np.array([0.5, 0.002, 0.0, 0.0001]))
    assert weights == pytest.approx([0.5, 0.002, 0.0, 0.0001], abs=1e-9) and error < 1e-9
    falling = rows @ np.array([1.0, -0.001, 0.0, 0.0])
    weights, error = non_negative_fit(rows, falling)
    assert min(weights) >= 0 and 0 < error < 0.05
