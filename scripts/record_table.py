#!/usr/bin/env python
"""Evaluate many schedules at several budgets, and write a table on which searches can be replayed.

    python scripts/record_table.py --schedules 1500 --out benchmarks/tables/digits.csv

The space is that of the study file, with one verb for all stages. Half of the schedules are drawn uniformly. In the
other half each block has no stage with probability 1/2, so that the table has gentle schedules too. Each schedule is
evaluated at the first rung, continued to the second, and so on. Seconds are CPU time (one thread each), because that
does not depend on other load. Schedules that are already in the table are skipped, so a stopped run can be continued.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from prunesearch.config import Budget, StudyConfig
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import Task, evaluate, model_shape
from prunesearch.files import load_study
from prunesearch.samplers.propose import seed_of
from prunesearch.schedule import Schedule
from prunesearch.search.problems import start_schedules
from prunesearch.space.choices import Choice, dimensions, grid_of, schedule_from, uid_of
from prunesearch.strict import to_mapping

STUDY = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
SPACE = ["space.same=[score, reduce]", "rungs=[{images: 0}, {images: 599}, {images: 2396}]", "limits={}"]
METRICS = ("top1", "loss", "agreement", "gmacs")
COLUMNS = ("uid", "rung", "images", *METRICS, "seconds", "schedule")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--schedules", type=int, default=1500)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--out", type=Path, required=True)
    parsed = arguments.parse_args()
    config = load_study(STUDY, SPACE)
    known = _known(parsed.out, len(config.rungs))
    chosen = schedules(config, parsed.schedules, parsed.seed)
    left = [schedule for schedule in chosen if uid_of(schedule, model_shape(config.model)) not in known]
    print(f"{len(chosen)} schedules, {len(chosen) - len(left)} of them in {parsed.out}", flush=True)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (
        ProcessPoolExecutor(parsed.processes, get_context("spawn")) as pool,
        parsed.out.open("a", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        for index, rows in enumerate(pool.map(measure, [config] * len(left), left), 1):
            writer.writerows(rows)  # all rungs at once, so that the table has no partial schedules
            file.flush()
            if index % 50 == 0:
                print(f"{index}/{len(left)}, {time.monotonic() - start:.0f} s", flush=True)


def schedules(config: StudyConfig, count: int, seed: int) -> list[Schedule]:
    """The start schedules, then random distinct ones. A larger count only appends schedules."""
    shape = model_shape(config.model)
    found = {uid_of(schedule, shape): schedule for _, schedule in start_schedules(config, shape)}
    draws = _draws(config, random.Random(seed))
    while len(found) < count:
        try:
            schedule = schedule_from(next(draws), config.space, shape)
            found.setdefault(uid_of(schedule, shape), schedule)
        except ScheduleError:
            continue
    return list(found.values())


def _draws(config: StudyConfig, generator: random.Random) -> Iterator[dict[str, float | str]]:
    while True:
        drawn: dict[str, float | str] = {}
        is_gentle = generator.random() < 0.5
        for name, dimension in dimensions(config.space).items():
            values = dimension.values if isinstance(dimension, Choice) else tuple(grid_of(dimension))
            drawn[name] = generator.choice(values)
            if is_gentle and name.endswith(".keep") and generator.random() < 0.5:
                drawn[name] = 1.0
        yield drawn


def measure(config: StudyConfig, schedule: Schedule) -> list[tuple[object, ...]]:
    """Evaluate a schedule at all rungs; returns one row for each rung."""
    torch.set_num_threads(1)
    uid = uid_of(schedule, model_shape(config.model))
    written = json.dumps(to_mapping(schedule)["stages"] if schedule.stages else [])
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        for rung, budget in enumerate(config.rungs):
            task = Task(
                uid, config.model, config.data, schedule, budget, METRICS, config.finetune, config.measure, rung,
                seed=seed_of(config.sampler.seed, uid), device="cpu", threads=1, resume_from=checkpoint,
                save_to=f"{folder}/{rung}",
            )  # fmt: skip
            _warm(task)
            start = time.process_time()
            evaluation = evaluate(task)
            seconds = time.process_time() - start
            if evaluation.status == "failed":
                raise RuntimeError(f"{schedule}: {evaluation.error}\n{evaluation.traceback}")
            checkpoint = evaluation.checkpoint
            values = [f"{evaluation.value(name):.6g}" for name in METRICS]
            rows.append((uid, rung, budget.images, *values, f"{seconds:.3f}", written))
    return rows


_is_warm = False


def _warm(task: Task) -> None:
    """Run a first task in each process, to exclude its one-time costs from the measurement."""
    global _is_warm
    if not _is_warm:
        evaluate(replace(task, schedule=Schedule(), budget=Budget(images=64), resume_from=None, save_to=None))
        _is_warm = True


def _known(path: Path, rungs: int) -> set[str]:
    """Uids of the schedules that are complete in the table."""
    if not path.is_file():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["uid"] for row in rows if row["rung"] == str(rungs - 1)}


if __name__ == "__main__":
    main()
