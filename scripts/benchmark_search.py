#!/usr/bin/env python
"""Compare search methods by the front that they find in the same evaluation time, replayed on a table of evaluations.

    python scripts/benchmark_search.py --table benchmarks/tables/digits.csv --seeds 20 --out benchmarks/search.md

All methods use the same seeds. A regression on the table predicts schedules that the table lacks
(`prunesearch/replay/surrogate.py`). Finished runs are kept in a file (`--runs`), and a second call only adds the
missing ones. Delete the file after a change of the search.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
import torch
from scipy.stats import wilcoxon
from suggest import suggest

from prunesearch.config import StudyConfig
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import build_model, model_shape
from prunesearch.evaluate.measure_sensitivity import measure_sensitivities
from prunesearch.evaluate.sensitivity import IMAGES_FOR_A_START, load_sensitivities, save_sensitivities
from prunesearch.evaluate.task import Evaluation
from prunesearch.files import load_study
from prunesearch.front import hypervolume
from prunesearch.replay.surrogate import Surrogate
from prunesearch.replay.table import Recorded, Table, read_table
from prunesearch.replay.workers import SimulatedWorkers, seconds_of
from prunesearch.report.plot import BLUE, FAINT, GREEN, GREY, INK, ORANGE
from prunesearch.samplers.token_gp import Regression, features, fitted_kernel
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.agreement import kendall_tau
from prunesearch.search.driver import run_study
from prunesearch.search.sensitivity_start import FILE, WORD
from prunesearch.space.choices import parameters_of

STUDY = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
SPACE = (
    "space.same=[score, reduce]",
    "limits={}",
    "stop.trials=100000",
    "workers={kind: serial}",
    "sampler.name=auto",
)
RANDOM_EVALUATIONS = 300
SHARES = (1 / 30, 1 / 10, 1 / 3, 1.0)
"""Shares of the total evaluation time at which methods are compared."""
REFERENCE = np.array([1.1, 1.1])
MOST_OF_GP = 60
VIEW_SIZES, VIEW_SEEDS = (25, 50, 100, 200, 400), 10
SLOW, FEW = ("GP", "prunesearch, iso-budgets", "prunesearch, rungs"), 8
"""Methods whose runs take minutes, and the number of seeds for these."""
DEFAULT, RANDOM = "prunesearch", "random"


@dataclass(frozen=True)
class Found:
    """A candidate evaluated at the full budget.

    second: when it was finished, in seconds of evaluation time. error: measured top-1 error in %. gmacs: its cost.
    expected: the error as a mean of many trainings.
    """

    second: float
    error: float
    gmacs: float
    expected: float


@dataclass(frozen=True)
class World:
    """The table and surrogate on which searches are replayed, and the time that a run may spend."""

    table: Table
    surrogate: Surrogate
    luck: bool
    """True: evaluations include the random noise of a training. False: they give the mean of many trainings."""
    sensitivities: Path
    """File with the sensitivities of the space. Its seconds are CPU time, like those of the table."""
    total: float
    """Seconds that each run may spend: as much as RANDOM_EVALUATIONS full evaluations of random schedules."""

    def measured(self, schedule: Schedule, rung: int) -> Recorded:
        """The evaluation that a search receives for a schedule at a rung."""
        look = self.surrogate.measured if self.luck else self.surrogate.expected
        return look(schedule, rung)

    @property
    def last(self) -> int:
        return len(self.table.images) - 1

    def seconds(self, schedule: Schedule) -> float:
        """Seconds to train a schedule from the start with the full budget and to measure it."""
        row = partial(self.measured, schedule)
        return seconds_of(row, self.table.images, self.table.images[-1])

    def found(self, second: float, schedule: Schedule) -> Found:
        measured, expected = (look(schedule, self.last) for look in (self.measured, self.surrogate.expected))
        return Found(
            second,
            100 - measured.metrics["top1"],
            measured.metrics["gmacs"],
            100 - expected.metrics["top1"],
        )


def study(*changes: str) -> StudyConfig:
    return load_study(STUDY, [*SPACE, *changes])


@cache
def world_of(path: Path, luck: bool, sensitivities: Path) -> World:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    config = study()
    table = read_table(path, model_shape(config.model))
    surrogate = Surrogate(table)
    draws = _random_schedules(config, np.random.default_rng(0), 2000)
    world = World(table, surrogate, luck, sensitivities, 0.0)
    mean = float(np.mean([world.seconds(schedule) for schedule in draws]))
    return replace(world, total=RANDOM_EVALUATIONS * mean)


def _random_schedules(config: StudyConfig, generator: np.random.Generator, count: int) -> list[Schedule]:
    shape, sampler = model_shape(config.model), optuna.samplers.RandomSampler(seed=int(generator.integers(2**31)))
    search = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    found: list[Schedule] = []
    while len(found) < count:
        trial = search.ask()
        try:
            found.append(suggest(trial, config.space, shape))
        except ScheduleError:
            continue
        finally:
            search.tell(trial, state=optuna.trial.TrialState.FAIL)
    return found


Search = Callable[[World, int], list[Found]]


# --- ways to search ----------------------------------------------------------------------------------------------


def plain_optuna(make: Callable[[int], optuna.samplers.BaseSampler], most: int | None = None) -> Search:
    """`study.optimize` with a sampler, and the full budget for every trial.

    Impossible schedules are pruned at no cost. Repeated schedules are evaluated again.

    most: stop after this many evaluations.
    """

    def search(world: World, seed: int) -> list[Found]:
        config, found, spent = study(), [], 0.0
        shape = model_shape(config.model)

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            nonlocal spent
            try:
                schedule = suggest(trial, config.space, shape)
            except ScheduleError as error:
                raise optuna.TrialPruned from error
            spent += world.seconds(schedule)
            if spent > world.total or (most is not None and len(found) >= most):
                trial.study.stop()
            else:
                found.append(world.found(spent, schedule))
            values = world.measured(schedule, world.last).metrics
            return values["top1"], values["gmacs"]

        optuna.create_study(directions=["maximize", "minimize"], sampler=make(seed)).optimize(objective)
        return found

    return search


def uniform_grid(world: World, seed: int) -> list[Found]:
    """All combinations of keep, verb and score with stages at blocks 2, 4 and 6, in random order."""
    keeps, verbs = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), ("drop", "fuse", "squeeze", "merge")
    grid = [
        Schedule(tuple(Stage(block, score=score, keep=keep, reduce=verb) for block in (2, 4, 6)))
        for keep in keeps
        for verb in verbs
        for score in (("class_attention", "value_weighted") if verb != "merge" else ("none",))
        if not (verb == "merge" and keep < 0.5)
    ]
    np.random.default_rng(seed).shuffle(grid)  # type: ignore[arg-type]
    found, spent = [], 0.0
    for schedule in grid:
        spent += world.seconds(schedule)
        found.append(world.found(spent, schedule))
    return found


def ours(*changes: str) -> Search:
    """`prunesearch run` with one worker. changes: to the study file."""

    def search(world: World, seed: int) -> list[Found]:
        return _run_ours(world, study(f"sampler.seed={seed}", *changes), 0.0, world.total)

    return search


def ours_in_turn(budgets: Sequence[float], *changes: str) -> Search:
    """One study for each iso-budget in turn, each with the same share of the time."""

    def search(world: World, seed: int) -> list[Found]:
        found, share = [], world.total / len(budgets)
        for index, gmacs in enumerate(budgets):
            config = study(f"sampler.seed={seed}", f"budget.gmacs={gmacs}", *changes)
            found += _run_ours(world, config, index * share, (index + 1) * share)
        return found

    return search


def _run_ours(world: World, config: StudyConfig, start: float, end: float) -> list[Found]:
    workers = SimulatedWorkers(world.table, config, measured=world.measured, seconds=end)
    workers.now = start
    with tempfile.TemporaryDirectory() as folder:
        if WORD in config.space.start_from:
            workers.now += load_sensitivities(world.sensitivities).seconds
            shutil.copy(world.sensitivities, Path(folder) / FILE)
        run_study(config, Path(folder), storage="memory:", make_workers=lambda *_: workers)
    last = len(config.rungs) - 1
    done = [one for one in workers.finished if one.task.rung == last and isinstance(one.outcome, Evaluation)]
    return [world.found(one.ended, one.task.schedule) for one in done]


FULL = "rungs=[{images: 2396}]"
RUNGS = "rungs=[{images: 0}, {images: 599}, {images: 2396}]"
NOTHING, SENSITIVITY = "space.start_from=[]", "space.start_from=[sensitivity]"
BUDGETS = (0.006, 0.0045, 0.008, 0.005, 0.007)
METHODS: dict[str, Search] = {
    RANDOM: plain_optuna(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    "uniform grid": uniform_grid,
    "NSGA-II": plain_optuna(lambda seed: optuna.samplers.NSGAIISampler(seed=seed)),
    "TPE": plain_optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "GP": plain_optuna(lambda seed: optuna.samplers.GPSampler(seed=seed), most=MOST_OF_GP),
    "prunesearch, no start": ours(FULL, NOTHING),
    "prunesearch, sampler tpe": ours(FULL, SENSITIVITY, "sampler.name=tpe"),
    "prunesearch, iso-budgets": ours_in_turn(BUDGETS, FULL, NOTHING),
    "prunesearch, rungs": ours(RUNGS, SENSITIVITY),
    DEFAULT: ours(FULL, SENSITIVITY),
}


# --- running them ------------------------------------------------------------------------------------------------


def sensitivities_in(folder: Path) -> Path:
    """Path of the sensitivities in a folder. They are measured first if the file is missing."""
    path = folder / FILE
    if not path.is_file():
        torch.set_num_threads(1)
        config = study("workers.device=cpu")
        build_model(config.model)  # warm-up: exclude imports and weights from the measurement
        start = time.process_time()
        found = measure_sensitivities(config, IMAGES_FOR_A_START)
        save_sensitivities(replace(found, seconds=time.process_time() - start), path)
    return path


def run_one(job: tuple[Path, bool, Path, str, int]) -> list[Found]:
    path, luck, sensitivities, name, seed = job
    return METHODS[name](world_of(path, luck, sensitivities), seed)


def all_runs(
    path: Path, luck: bool, sensitivities: Path, seeds: Mapping[str, int], kept: Path
) -> dict[str, list[list[Found]]]:
    """The runs of each method for its number of seeds. Runs that are in the file `kept` are not repeated."""
    about = blake2b(path.read_bytes() + bytes([luck]), digest_size=8).hexdigest()
    known: dict[tuple[str, int], list[Found]] = {}
    if kept.is_file():
        for line in kept.read_text().splitlines():
            entry = json.loads(line)
            if entry["about"] == about:
                known[entry["method"], entry["seed"]] = [Found(*one) for one in entry["found"]]
    wanted = [(name, seed) for name, count in seeds.items() for seed in range(count)]
    missing = [one for one in wanted if one not in known]
    jobs = [(path, luck, sensitivities, name, seed) for name, seed in missing]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool, kept.open("a") as file:
        for (*_, name, seed), found in zip(jobs, pool.map(run_one, jobs), strict=True):
            known[name, seed] = found
            entry = {"about": about, "method": name, "seed": seed, "found": [astuple(one) for one in found]}
            file.write(json.dumps(entry) + "\n")
            file.flush()
            print(f"{name}, seed {seed}: {len(found)} at the full budget", flush=True)
    return {name: [known[name, seed] for seed in range(count)] for name, count in seeds.items()}


# --- judging them ------------------------------------------------------------------------------------------------


def front_of(found: Sequence[Found]) -> list[Found]:
    """The non-dominated candidates by measured error and GMACs, cheapest first."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda one: (one.gmacs, one.error)):
        if not kept or one.error < kept[-1].error:
            kept.append(one)
    return kept


@dataclass(frozen=True)
class Judge:
    """Computes the hypervolume of a run, in a box that is the same for all runs.

    again: use the expected error (the mean of many trainings) of the schedules on the front, not the measured one,
    which is biased by selection. low, high: (error, GMACs), ideal and nadir point of the front over all runs together.
    """

    again: bool
    low: np.ndarray
    high: np.ndarray

    def points(self, found: Sequence[Found]) -> np.ndarray:
        rows = [(one.expected if self.again else one.error, one.gmacs) for one in front_of(found)]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def volume(self, found: Sequence[Found]) -> float:
        """Hypervolume as a share of the box up to the reference point."""
        scaled = (self.points(found) - self.low) / (self.high - self.low)
        return hypervolume(scaled, REFERENCE) / float(np.prod(REFERENCE))

    def curve(self, found: Sequence[Found], seconds: Sequence[float]) -> np.ndarray:
        """The volume at each of these times; 0 before the first result."""
        return np.array([self.volume([one for one in found if one.second <= second]) for second in seconds])


def judge_of(runs: Mapping[str, list[list[Found]]], again: bool) -> Judge:
    everything = [one for found in runs.values() for run in found for one in run]
    if again:
        everything = [replace(one, error=one.expected) for one in everything]
    union = np.array([(one.error, one.gmacs) for one in front_of(everything)])
    return Judge(again, union.min(axis=0), union.max(axis=0))


def checkpoint_table(volumes: Mapping[str, np.ndarray]) -> str:
    """A table of median and quartiles. volumes: method -> (seeds, checkpoints)."""
    lines = [f"| search | {' | '.join(f'{_share(share)} of the cost' for share in SHARES)} |"]
    lines.append("|---|" + "---|" * len(SHARES))
    for name, values in volumes.items():
        low, middle, high = np.percentile(values, (25, 50, 75), axis=0)
        cells = [f"**{m:.3f}** ({a:.3f} to {b:.3f})" for a, m, b in zip(low, middle, high, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pair_table(volumes: Mapping[str, np.ndarray]) -> str:
    """A table: for how many seeds the default has the larger volume, and the p-value of a Wilcoxon test."""
    lines = [f"| prunesearch against | {' | '.join(f'{_share(share)} of the cost' for share in SHARES)} |"]
    lines.append("|---|" + "---|" * len(SHARES))
    for name, values in volumes.items():
        if name == DEFAULT:
            continue
        difference = volumes[DEFAULT][: len(values)] - values
        cells = []
        for column in difference.T:
            p = wilcoxon(column).pvalue if np.any(column) else 1.0
            cells.append(f"{(column > 0).sum()} of {len(column)}, p = {p:.2g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reach_table(curves: Mapping[str, np.ndarray], seconds: np.ndarray) -> str:
    """A table: the share of the time after which the median volume reaches the final one of random search."""
    target = np.median(curves[RANDOM], axis=0)[-1]
    lines = ["| search | share of the cost |", "|---|---|"]
    for name, values in curves.items():
        reached = np.flatnonzero(np.median(values, axis=0) >= target)
        share = f"{seconds[reached[0]] / seconds[-1]:.3f}" if len(reached) else "not reached"
        lines.append(f"| {name} | {share} |")
    return "\n".join(lines)


def _share(share: float) -> str:
    return "all" if share == 1 else f"1/{round(1 / share)}"


# --- pictures ----------------------------------------------------------------------------------------------------

COLOURS = {RANDOM: GREY, "NSGA-II": GREEN, "TPE": ORANGE, DEFAULT: BLUE}


def _axes(columns: int, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.grid(color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelcolor=INK, labelsize=9, color=GREY)
    return figure, axes


def draw_curves(curves: Mapping[str, np.ndarray], seconds: np.ndarray, path: Path) -> None:
    """Plot median and quartiles over the seeds."""
    figure, axes = _axes(1)
    axis = axes[0, 0]
    shares = seconds / seconds[-1]
    for name, colour in COLOURS.items():
        low, middle, high = np.percentile(curves[name], (25, 50, 75), axis=0)
        axis.fill_between(shares, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(shares, middle, color=colour, linewidth=2, label=name)
    axis.axhline(np.median(curves[RANDOM], axis=0)[-1], color=GREY, linewidth=0.9, linestyle=(0, (1, 3)))
    axis.set_xscale("log")
    axis.set_xticks(SHARES, [_share(share) for share in SHARES])
    axis.minorticks_off()
    axis.set_xlabel("share of the cost of 300 full evaluations", color=INK)
    axis.set_ylabel("normalised hypervolume", color=INK)
    axis.legend(frameon=False, labelcolor=INK)
    figure.savefig(path)


def draw_attainment(runs: Mapping[str, list[list[Found]]], judge: Judge, second: float, path: Path) -> None:
    """Plot, over GMACs, the error that a quarter, half and three quarters of the runs reach with at most this cost."""
    figure, axes = _axes(2, 2)
    everything = np.concatenate([judge.points(run) for found in runs.values() for run in found])
    best = _steps(everything, grid := np.linspace(judge.low[1], judge.high[1], 300))
    for axis, (name, colour) in zip(axes.flat, COLOURS.items(), strict=True):
        reached = np.array([_steps(judge.points([x for x in r if x.second <= second]), grid) for r in runs[name]])
        early, middle, late = np.percentile(reached, (25, 50, 75), axis=0, method="nearest")
        axis.fill_between(grid, early, late, color=colour, alpha=0.2, linewidth=0, step="post")
        axis.step(grid, middle, color=colour, linewidth=2, where="post")
        axis.step(grid, best, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), where="post")
        axis.set_title(name, color=INK, loc="left", fontsize=11)
        axis.set_ylim(0.9 * judge.low[0], 1.2 * judge.high[0])
    figure.supxlabel("GMACs of one image", color=INK, fontsize=10.5)
    figure.supylabel("top-1 error (%)", color=INK, fontsize=10.5)
    figure.savefig(path)


def _steps(points: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """For each GMACs value of the grid, the smallest error at no higher cost; 100 where there is none."""
    errors = np.full(len(grid), 100.0)
    for error, gmacs in points:
        errors[grid >= gmacs] = np.minimum(errors[grid >= gmacs], error)
    return errors


# --- the page ----------------------------------------------------------------------------------------------------


def error_table(surrogate: Surrogate) -> str:
    lines = ["| | images | mean absolute error | R2 | tau | tau, best third |", "|---|---|---|---|---|---|"]
    for one in surrogate.errors():
        numbers = f"{one.mae:.3f} | {one.r2:.2f} | {one.tau:.2f} | {one.tau_best:.2f}"
        lines.append(f"| {one.name} | {one.images} | {numbers} |")
    return "\n".join(lines)


def view_table(table: Table, config: StudyConfig) -> str:
    """A table: how well the model of sampler token_gp predicts schedules from tokens and from parameters."""
    last = len(table.images) - 1
    views: dict[str, list[dict[str, Any]]] = {"tokens": [], "parameters": []}
    errors = []
    for uid, schedule in table.schedules.items():
        parameters = parameters_of(schedule, config.space)
        if parameters is not None:
            views["tokens"].append(features(schedule, table.shape))
            views["parameters"].append(dict(parameters))
            errors.append(100 - table.rows[uid][last].metrics["top1"])
    lines = [f"| of {len(errors)} | {' | '.join(map(str, VIEW_SIZES))} |", "|---|" + "---|" * len(VIEW_SIZES)]
    for name, rows in views.items():
        cells = []
        for size in VIEW_SIZES:
            taus = []
            for seed in range(VIEW_SEEDS):
                order = np.random.default_rng(seed).permutation(len(rows))
                known, other = ([values[i] for i in order[:size]] for values in (rows, errors)), order[size:]
                inputs, targets = known
                predicted, _ = Regression(inputs, targets, fitted_kernel(inputs, targets)).predict(
                    [rows[i] for i in other]
                )
                tau = kendall_tau([(errors[i], value) for i, value in zip(other, predicted, strict=True)])
                taus.append(float("nan") if tau is None else tau)
            cells.append(f"{np.mean(taus):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


ABOUT = {
    RANDOM: "independent draws (Optuna's RandomSampler)",
    "uniform grid": "the same keep at blocks 2, 4 and 6, each verb and score, in random order",
    "NSGA-II": "`study.optimize` with Optuna's NSGAIISampler as it comes, full budget for all",
    "TPE": "the same with Optuna's TPESampler",
    "GP": f"the same with Optuna's GPSampler, for {MOST_OF_GP} candidates",
    DEFAULT: "sampler `auto`, one rung, `start_from: [sensitivity]`, which takes {sensing:.1f} s to measure",
    "prunesearch, no start": "the same without the sensitivities",
    "prunesearch, sampler tpe": "the same with Optuna's TPE, multivariate, in place of `auto`",
    "prunesearch, iso-budgets": "without a start, `budget: {{gmacs: ...}}`: {budgets} in turn, a fifth of the time",
    "prunesearch, rungs": "the default with `rungs: [{{images: 0}}, {{images: 599}}, {{images: 2396}}]`",
}


def methods_table(seeds: Mapping[str, int], sensing: float) -> str:
    lines = ["| search | seeds | what it is |", "|---|---|---|"]
    for name, about in ABOUT.items():
        if name in seeds:
            words = about.format(sensing=sensing, budgets=", ".join(map(str, BUDGETS)))
            lines.append(f"| {name} | {seeds[name]} | {words} |")
    return "\n".join(lines)


PAGE = """\
# How good is the front after so many seconds of evaluation?

{schedules} schedules of the digits ViT (`{table}`, made with `scripts/record_table.py`) were measured as they
come, after 599 and after 2396 training images. Searches of the same space replay on that table, through the real driver
of prunesearch, or through `study.optimize` of Optuna, with paired seeds and one worker.

- **Cost**: seconds of evaluation, everything counted but the questions of the samplers. Every run may spend
  {total:.0f} s, what random search needs for {evaluations} evaluations at the full budget (2396 images). Impossible
  schedules cost nothing, repeated ones cost again.
- **Result**: schedules evaluated at the full budget; what is known of others is no result.
- **Score**: hypervolume of top-1 error and GMACs up to ({reference:g}, {reference:g}), as a share of it, in a box whose
  corners are the ideal and the nadir of the front of everything that any run found: {box}.
- **Luck**: {luck}

{methods}

## Hypervolume

Median over the seeds, and quartiles.

{checkpoints}

How many of the paired seeds prunesearch wins, and the p of Wilcoxon's signed-rank test (two-sided):

{pairs}

Share of the cost after which the median is what random search ends with ({target:.3f}):

{reach}

![hypervolume against cost]({stem}_cost.png)

What is attained at a tenth of the cost: median over the seeds with the quartiles, and dashed the front of everything
that any run found.

![attainment surfaces]({stem}_attainment.png)

## The same runs, judged as measured

Here a front is worth what was measured when it was picked. That counts the luck of training as merit: whoever trains
most schedules at the full budget draws most often.

{other}

## Tokens or parameters

The model of `auto` sees what a schedule does to the tokens of each block, and not how the space spells it. The
regression below, which fills the table in, sees tokens too; what that is worth can only be said of what was measured.
With so many of the measured schedules, this Gaussian process predicts the measured top-1 at the full budget of all
others with this Kendall tau, by what it sees of them (mean over {view_seeds} random choices). Most of what is missing
is the luck of training.

{view}

## What fills the table in

A ridge regression on products of token counts, verb and score. Its errors for schedules that it did not see (five-fold
cross validation), tau also within the third of the schedules that was measured best. At the full budget most of the
error is the luck of training: the same schedule trained six times has a standard deviation of 0.4 to 0.8 points of
top-1, and the mean of the six is within 0.5 of the regression (six schedules were tried).

{errors}

Made with `python scripts/benchmark_search.py {arguments}`.
"""
WITH_LUCK = (
    "a search is told what one training gives: what was measured, or for schedules that were not measured the mean "
    "that a regression predicts plus the residuals of one measured schedule, at all budgets. The front that it finds "
    "is judged by what its schedules give on average, when they are trained again."
)
WITHOUT_LUCK = "none: every schedule gives the mean of its trainings, which a regression of the table predicts."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("outputs/benchmark_search.jsonl"), help="finished runs")
    parser.add_argument("--without-luck", action="store_true", help="replay the mean of many trainings")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    luck = not arguments.without_luck
    arguments.runs.parent.mkdir(parents=True, exist_ok=True)
    sensitivities = sensitivities_in(arguments.runs.parent)
    world = world_of(arguments.table, luck, sensitivities)
    names = list(dict.fromkeys([*COLOURS, *arguments.methods]))
    names = [name for name in METHODS if name in names]
    seeds = {name: min(arguments.seeds, FEW) if name in SLOW else arguments.seeds for name in names}
    runs = all_runs(arguments.table, luck, sensitivities, seeds, arguments.runs)

    seconds = world.total * np.geomspace(0.01, 1, 61)
    judge, measured = judge_of(runs, again=True), judge_of(runs, again=False)
    at = [share * world.total for share in SHARES]
    volumes = {name: np.array([judge.curve(run, at) for run in found]) for name, found in runs.items()}
    as_measured = {name: np.array([measured.curve(run, at) for run in found]) for name, found in runs.items()}
    curves = {name: np.array([judge.curve(run, seconds) for run in found]) for name, found in runs.items()}
    stem = arguments.out.stem
    draw_curves(curves, seconds, arguments.out.with_name(f"{stem}_cost.png"))
    draw_attainment(runs, judge, world.total / 10, arguments.out.with_name(f"{stem}_attainment.png"))
    used = [
        f"--table {arguments.table} --seeds {arguments.seeds} --out {arguments.out}",
        "" if luck else "--without-luck",
        "" if set(names) == set(METHODS) else f"--methods {' '.join(shlex.quote(name) for name in names)}",
    ]
    arguments.out.write_text(
        PAGE.format(
            schedules=len(world.table.rows),
            table=arguments.table,
            methods=methods_table(seeds, load_sensitivities(sensitivities).seconds),
            total=world.total,
            evaluations=RANDOM_EVALUATIONS,
            reference=REFERENCE[0],
            box=f"error {judge.low[0]:.2f} to {judge.high[0]:.2f} %, GMACs {judge.low[1]:.5f} to {judge.high[1]:.5f}",
            luck=WITH_LUCK if luck else WITHOUT_LUCK,
            checkpoints=checkpoint_table(volumes),
            pairs=pair_table(volumes),
            target=float(np.median(volumes[RANDOM], axis=0)[-1]),
            reach=reach_table(curves, seconds),
            stem=stem,
            other=checkpoint_table(as_measured),
            view=view_table(world.table, study()),
            view_seeds=VIEW_SEEDS,
            errors=error_table(world.surrogate),
            arguments=" ".join(filter(None, used)),
        )
    )


if __name__ == "__main__":
    main()
