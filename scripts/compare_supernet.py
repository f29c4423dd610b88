#!/usr/bin/env python
"""Compare how shared weights and separate fine-tunes rank schedules, and what they cost, on the digits.

    python scripts/compare_supernet.py --out benchmarks/supernet.md

Random schedules of `search_spaces/digits_supernet.yaml` are measured without training with the original weights,
without training with shared weights, and after a fine-tune of each. Takes five minutes on one core.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from prunesearch import Schedule, Task, load_study
from prunesearch.config import Budget, StudyConfig, WorkersConfig
from prunesearch.evaluate import Evaluation, evaluate
from prunesearch.evaluate.sampling import draw_schedule
from prunesearch.search.agreement import kendall_tau
from prunesearch.search.rungs import BANDS, bands_of
from prunesearch.search.shared_weights import SupernetTrained, prepare_supernet, supernet_task
from prunesearch.workers.serial import SerialWorkers

STUDY = Path(__file__).parents[1] / "search_spaces" / "digits_supernet.yaml"


class Run(NamedTuple):
    """Evaluations of all schedules, and their CPU seconds."""

    results: list[Evaluation]
    seconds: float


def measured(
    config: StudyConfig, schedules: Sequence[Schedule], images: int = 0, start: str | None = None, seed: int = 0
) -> Run:
    before = time.process_time()
    results = []
    for schedule in schedules:
        results.append(evaluate(task_of(config, schedule, images, start, seed)))
        if results[-1].status != "complete":
            raise SystemExit(results[-1].traceback)
    return Run(results, time.process_time() - before)


def task_of(config: StudyConfig, schedule: Schedule, images: int, start: str | None, seed: int) -> Task:
    return Task(
        uid="compare", model=config.model, data=config.data, schedule=schedule, budget=Budget(images=images),
        metrics=("top1", "loss", "gmacs"), finetune=config.finetune, seed=seed, threads=1, start=start,
    )  # fmt: skip


def means(runs: Sequence[Run], metric: str) -> list[float]:
    """Mean of a metric for each schedule, over several runs."""
    together = zip(*(run.results for run in runs), strict=True)
    return [statistics.mean(one.value(metric) for one in same) for same in together]


def row(text: str, runs: Sequence[Run], truth: Sequence[Run]) -> str:
    """Correlations overall, within each third of the range of costs (cheapest first), and of the loss."""
    bands = bands_of(means(truth, "gmacs"))
    pairs = list(zip(means(runs, "top1"), means(truth, "top1"), strict=True))
    groups = [[pair for pair, its in zip(pairs, bands, strict=True) if its == band] for band in range(BANDS)]
    losses = list(zip(means(runs, "loss"), means(truth, "loss"), strict=True))
    taus = [kendall_tau(group) for group in (pairs, *groups, losses)]
    said = " | ".join("-" if tau is None else f"{tau:.2f}" for tau in taus)
    seconds = statistics.mean(run.seconds for run in runs)
    return f"| {text} | {said} | {statistics.mean(means(runs, 'top1')):.1f} | {seconds:.0f} |"


PAGE = """\
# Shared weights: do they rank schedules, and what do they cost?

{count} random schedules of `search_spaces/digits_supernet.yaml`, {fewest:.0%} to {most:.0%} of the dense model's MACs
({sizes} in the thirds of that range, cheapest first). The truth is the mean over {seeds} seeds of a fine-tune of
{images} images from the original weights, measured on the held-out third of the digits. Kendall's tau-b with it: of
top-1, overall and within each third of costs, and of the loss. CPU seconds of one core, for all {count}.

| measured | top-1 | cheapest third | middle | dearest | loss | mean top-1, % | seconds |
|---|---|---|---|---|---|---|---|
{rows}

The last row is one seed of the fine-tune against the mean of the others: what seeds alone leave of a ranking. With
{count} schedules a tau has a standard error of about {error:.2f}.

Training the shared weights took {shared_seconds:.0f} CPU seconds, once for the whole study: {shared_images} images,
each seen by the dense model, the cheapest schedule and {schedules} random ones.

Made with `python scripts/compare_supernet.py --schedules {count} --images {images} --seeds {seeds}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=24)
    parser.add_argument("--images", type=int, default=2396, help="training images of a fine-tune (2 epochs)")
    parser.add_argument("--seeds", type=int, default=2, help="of the fine-tune; two or more")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = replace(load_study(STUDY), workers=WorkersConfig(kind="serial"))

    def told(event: SupernetTrained) -> None:
        print(f"shared weights: {event.images} of {event.total} images", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = supernet_task(config, folder).supernet
        generator = random.Random(0)
        schedules = [
            draw_schedule(work.space, work.limits, config.model, generator) for _ in range(arguments.schedules)
        ]
        dense = means([measured(config, [Schedule()])], "gmacs")[0]  # also loads model and data, before the timing
        before = time.process_time()
        shared = prepare_supernet(config, folder, folder, SerialWorkers(config.workers, folder), told)
        shared_seconds = time.process_time() - before
        original = measured(config, schedules)
        with_shared = measured(config, schedules, start=shared)
    truth = []
    for seed in range(arguments.seeds):
        truth.append(measured(config, schedules, arguments.images, seed=seed))
        print(f"seed {seed} of the fine-tune: {truth[-1].seconds:.0f} s", flush=True)
    costs = means(truth, "gmacs")
    bands, count = bands_of(costs), len(schedules)
    rows = [
        row("as it comes, original weights", [original], truth),
        row("as it comes, shared weights", [with_shared], truth),
        row("one seed of the fine-tune", truth[:1], truth[1:]),
    ]
    page = PAGE.format(
        count=count, images=arguments.images, seeds=arguments.seeds, fewest=min(costs) / dense,
        most=max(costs) / dense, sizes=", ".join(str(bands.count(band)) for band in range(BANDS)),
        rows="\n".join(rows), error=(2 * (2 * count + 5) / (9 * count * (count - 1))) ** 0.5,
        shared_images=work.images, schedules=work.schedules, shared_seconds=shared_seconds,
    )  # fmt: skip
    print(page)
    if arguments.out:
        arguments.out.write_text(page)


if __name__ == "__main__":
    main()
