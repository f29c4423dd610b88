#!/usr/bin/env python
"""Measure the cost of the driver itself: thousands of candidates, simulated workers, evaluations that take no time.

    python scripts/benchmark_driver.py --out benchmarks/driver.md

Sampler, promotions and SQLite are real; only evaluations are simulated. Each row runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from prunesearch.config import SamplerConfig, StudyConfig
from prunesearch.cost import estimate_cost
from prunesearch.evaluate import model_shape
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import load_study
from prunesearch.replay.table import Recorded, Table
from prunesearch.replay.workers import SimulatedWorkers
from prunesearch.schedule import Schedule
from prunesearch.search import driver, loop
from prunesearch.search.events import Submitted
from prunesearch.workers.protocol import Lost

STUDY = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
BUDGETS = (0, 599, 2396)
RUNGS = {"one": "rungs=[{images: 0}]", "three": "rungs=[{images: 0}, {images: 599}, {images: 2396}]"}
RUNS = [("random", "one"), ("auto", "one"), ("auto", "three")]
PER_BLOCK = 1000


def study(sampler: str, rungs: str, candidates: int, workers: int) -> StudyConfig:
    changes = ["space.start_from=[]", f"stop.trials={candidates}", RUNGS[rungs], "workers.kind=serial"]
    config = load_study(STUDY, changes)
    # sampler auto depends on the count; the workers are simulated
    workers_config = replace(config.workers, count=workers)
    return replace(config, sampler=SamplerConfig(sampler, 0), workers=workers_config, metrics=())


def made_up(table: Table, schedule: Schedule, rung: int) -> Recorded:
    """A made-up evaluation: later stages hurt less, training reduces the damage, expensive schedules take longer."""
    gmacs = estimate_cost(table.shape, schedule).gmacs
    damage = sum((1.0 - (stage.keep or 1.0)) / (1 + stage.block) for stage in schedule.stages)
    return Recorded({"top1": 97 - 40 * damage / (1 + rung), "gmacs": gmacs}, (1 + 4 * rung) * gmacs)


def measure(sampler: str, rungs: str, candidates: int, workers: int) -> dict[str, list[list[float]]]:
    """For each step, the milliseconds since the result arrived; and resident megabytes after each block of results."""
    config = study(sampler, rungs, candidates, workers)
    shape = model_shape(config.model)
    table = Table(shape, BUDGETS, ("top1", "gmacs"), {}, {})
    simulated = SimulatedWorkers(
        table, config, measured=lambda schedule, rung: made_up(table, schedule, rung), count=workers
    )
    since: dict[str, list[float]] = defaultdict(list)
    megabytes: list[float] = []
    start: float | None = None

    def handle(search: loop.Search, task: Task, outcome: Evaluation | Lost) -> None:
        nonlocal start
        start = time.perf_counter()
        whole_cycle(search, task, outcome)
        since["discarded"].append(1000 * (time.perf_counter() - start))
        start = None
        if len(since["discarded"]) % PER_BLOCK == 0:
            megabytes.append(resident_megabytes())

    def submit_all(search: loop.Search) -> list[Submitted]:
        submitted = submit(search)
        if start is not None:  # the first candidates are submitted before there is a result
            since["submitted"].append(1000 * (time.perf_counter() - start))
        return submitted

    whole_cycle, submit = loop.Search._handle, loop.Search._submit_all
    loop.Search._handle, loop.Search._submit_all = handle, submit_all  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        driver.run_study(config, Path(folder), make_workers=lambda *_: simulated)
    submitted = blocks(since["submitted"])
    return {"submitted": submitted, "discarded": blocks(since["discarded"]), "megabytes": [megabytes]}


def blocks(values: Sequence[float]) -> list[list[float]]:
    return [list(values[start : start + PER_BLOCK]) for start in range(0, len(values), PER_BLOCK)]


def resident_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


PAGE = """\
# What the driver costs

{candidates} candidates of the digits space (8 parameters), {workers} simulated workers whose evaluations take no time,
SQLite in a temporary folder, 2 CPU cores. Milliseconds.

## From a result to the next submission

A worker is idle for so long. The result is written to the storage, the sampler learns, a promotion or a new candidate
is picked, claimed in the storage, and submitted. Median, 90 % and 99 %, all results and by {block} of them.

{submitted}

## The whole cycle

The same until the result is deleted from the outbox: what one driver can do at most.

{cycle}

## Resident memory

Megabytes after so many results, the libraries included.

{memory}

Made with `python scripts/benchmark_driver.py --candidates {candidates} --workers {workers} --out {out}`.
"""


def name_of(sampler: str, rungs: str) -> str:
    return f"{sampler}, {rungs} rung{'s' if rungs != 'one' else ''}"


def time_table(found: dict[str, dict[str, list[list[float]]]], step: str) -> str:
    most = max(len(one[step]) for one in found.values())
    lines = ["| search | all | " + " | ".join(f"to {PER_BLOCK * (i + 1)}" for i in range(most)) + " |"]
    lines.append("|---|---|" + "---|" * most)
    for name, one in found.items():
        every = [value for block in one[step] for value in block]
        cells = [_percentiles(values) for values in (every, *one[step])]
        lines.append(f"| {name} | " + " | ".join(cells + [""] * (most + 1 - len(cells))) + " |")
    return "\n".join(lines)


def _percentiles(values: Sequence[float]) -> str:
    middle, high, highest = np.percentile(values, (50, 90, 99))
    return f"**{middle:.1f}** {high:.1f} {highest:.1f}"


def memory_table(found: dict[str, dict[str, list[list[float]]]]) -> str:
    most = max(len(one["megabytes"][0]) for one in found.values())
    lines = ["| search | " + " | ".join(str(PER_BLOCK * (i + 1)) for i in range(most)) + " |"]
    lines.append("|---|" + "---|" * most)
    for name, one in found.items():
        cells = [f"{value:.0f}" for value in one["megabytes"][0]]
        lines.append(f"| {name} | " + " | ".join(cells + [""] * (most - len(cells))) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # internal: arguments of the measured processes
    arguments = parser.parse_args()
    if arguments.only:
        sampler, rungs = arguments.only
        arguments.out.write_text(json.dumps(measure(sampler, rungs, arguments.candidates, arguments.workers)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for sampler, rungs in RUNS:
            result = Path(place) / "result.json"
            flags = ["--only", sampler, rungs, "--out", str(result)]
            flags += ["--candidates", str(arguments.candidates), "--workers", str(arguments.workers)]
            subprocess.run([sys.executable, __file__, *flags], check=True)
            found[name_of(sampler, rungs)] = json.loads(result.read_text())
            print(name_of(sampler, rungs), _percentiles(np.concatenate(found[name_of(sampler, rungs)]["submitted"])))
    arguments.out.write_text(
        PAGE.format(
            candidates=arguments.candidates,
            workers=arguments.workers,
            block=PER_BLOCK,
            out=arguments.out,
            submitted=time_table(found, "submitted"),
            cycle=time_table(found, "discarded"),
            memory=memory_table(found),
        )
    )


if __name__ == "__main__":
    main()
