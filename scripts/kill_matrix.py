#!/usr/bin/env python
"""Kill drivers that share a study at random moments, and count lost results and repeated evaluations.

    python scripts/kill_matrix.py --runs 3 --databases sqlite,postgres

Four drivers, each with its own folder, run one study with short made-up evaluations. Now and then one of them gets
SIGKILL and is started again a little later. The script reports

    lost      results that were in an outbox and are not in the study
    repeated  evaluations that began although a result for the same candidate and rung was already in an outbox (an
              evaluation that was killed may run again)
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from driving import BEGUN, Line, end, fake_search, ledger, read, start, wait_for
from postgres import postgres

from prunesearch.config import ConfirmConfig, StudyConfig
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import SPEED, Record

LEASE_SECONDS = 3.0


@dataclass(frozen=True)
class Outcome:
    """Counts of one run."""

    candidates: int
    confirmations: int
    begun: int
    cut_short: int
    lost: list[str]
    repeated: list[str]
    seconds: float


def study(candidates: int) -> StudyConfig:
    """A study with three rungs, promotions, and confirmations at the end."""
    config = fake_search.small_study(candidates, "random", space=fake_search.SPACE)
    return replace(config, confirm=ConfirmConfig(seeds=1))


def run(place: Path, url: str, seed: int, drivers: int, candidates: int, kills: int, seconds: float) -> Outcome:
    """Run one search with `kills` kills. Raises AssertionError when a driver fails or the study is incomplete."""
    chance, config, begun = random.Random(seed), study(candidates), time.monotonic()

    def start_driver(number: int) -> BaseProcess:
        return start(place / f"driver{number}", url, config, seconds=seconds, lease=LEASE_SECONDS)

    processes = [start_driver(number) for number in range(drivers)]
    try:
        for threshold in sorted(chance.sample(range(drivers, candidates), kills)):
            wait_for(place, threshold)
            time.sleep(chance.random() * 2 * seconds)
            number = chance.randrange(drivers)
            processes[number].kill()
            processes[number].join()
            time.sleep(chance.choice((0.0, 0.0, 2 * seconds, LEASE_SECONDS)))
            processes[number] = start_driver(number)
    finally:
        end(*processes)
    found, lines = read(url), ledger(place)
    assert len(found) == len({record.uid for record in found}) == candidates, f"{len(found)} candidates"
    assert {record.state for record in found} <= {"complete", "paused"}, "a candidate is still running"
    assert any(record.confirmations for record in found), "nothing was confirmed"
    begins = sum(line.what in BEGUN for line in lines)
    return Outcome(
        candidates=len(found),
        confirmations=sum(len(record.confirmations) for record in found),
        begun=begins,
        cut_short=begins - len({(line.uid, line.rung) for line in lines if line.what in BEGUN}),
        lost=lost(found, lines),
        repeated=repeated(found, lines),
        seconds=time.monotonic() - begun,
    )


def lost(found: list[Record], lines: list[Line]) -> list[str]:
    """Results that were in an outbox and are not in the study.

    Of the timings at the end a study keeps the last one, as speeds of its records.
    """
    known = {(one.uid, one.rung) for one in _evaluations(found)}
    written = {(line.uid, line.rung) for line in lines if line.what == "written"}
    if any(record.speed is not None for record in found):
        known |= {(uid, rung) for uid, rung in written if uid.startswith(f"{SPEED}-")}
    return [f"{uid} {rung}" for uid, rung in sorted(written - known)]


def repeated(found: list[Record], lines: list[Line]) -> list[str]:
    """Evaluations that began after a result of the same candidate and rung was in an outbox.

    A worker may die after writing to the outbox and before writing this to the ledger. So a result that the study has
    counts as written from the moment when it was returned.
    """
    stored = {one.host for one in _evaluations(found)}
    done: dict[tuple[str, int], float] = {}
    for line in lines:
        if line.what == "written" or (line.what == "returned" and line.token in stored):
            key = line.uid, line.rung
            done[key] = min(line.time, done.get(key, line.time))
    twice = (
        line
        for line in lines
        if line.what == "known" or (line.what == "begun" and line.time > done.get((line.uid, line.rung), line.time))
    )
    return [f"{line.uid} {line.rung}" for line in twice]


def _evaluations(found: list[Record]) -> Iterator[Evaluation]:
    for record in found:
        yield from (*record.evaluations, *record.confirmations)


@contextmanager
def database(kind: str, place: Path) -> Iterator[str]:
    """The URL of a new database."""
    if kind == "sqlite":
        yield f"sqlite:///{place / 'study.db'}"
    else:
        with postgres() as server:
            yield server.url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="with each database; default 3")
    parser.add_argument("--databases", default="sqlite,postgres", help="default sqlite,postgres")
    parser.add_argument("--drivers", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--kills", type=int, default=5, help="in each run; default 5")
    parser.add_argument("--seconds", type=float, default=0.3, help="of an evaluation; default 0.3")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; chosen at random by default")
    arguments = parser.parse_args()
    first = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    is_fine = True
    for kind in arguments.databases.split(","):
        for seed in range(first, first + arguments.runs):
            with tempfile.TemporaryDirectory() as folder, database(kind, Path(folder)) as url:
                one = run(
                    Path(folder), url, seed, arguments.drivers, arguments.candidates, arguments.kills, arguments.seconds
                )
            print(
                f"{kind}, seed {seed}: {arguments.drivers} drivers, {arguments.kills} kills, {one.candidates} "
                f"candidates, {one.confirmations} confirmations, {one.begun} evaluations, {one.cut_short} of them "
                f"for what was cut short; {len(one.lost)} lost, {len(one.repeated)} repeated; {one.seconds:.0f} s",
                *(f"\n  lost: {what}" for what in one.lost),
                *(f"\n  repeated: {what}" for what in one.repeated),
                flush=True,
            )
            is_fine = is_fine and not one.lost and not one.repeated
    return 0 if is_fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
