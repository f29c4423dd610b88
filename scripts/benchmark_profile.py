"""Compare what device profiles predict with what is measured: speed-ups of random schedules, model by model.

    python scripts/benchmark_profile.py --models deit_tiny_patch16_224 --batches 1 --out benchmarks/profile.md

Each row profiles a model, then measures the dense model and SCHEDULES random schedules whole, in turns. The schedules
cost 50 to 80 % of the dense model's MACs. What is compared is the speed-up over the dense model, so that the present
speed of the machine divides out. Weights are random, because time does not depend on them.

Every row is kept in a JSON file beside the page, schedule by schedule. Rows that are there already are not measured
again, so that the page can be made in several sittings; --again measures them anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

from prunesearch.config import ModelConfig
from prunesearch.cost import estimate_cost, total_cost
from prunesearch.device.measure import usual_score
from prunesearch.device.profiles import cores, measure_profiles, processor
from prunesearch.device.runtimes import Settings, prepare, runtime_of, threads_set
from prunesearch.device.timing import Measured, in_turns
from prunesearch.errors import ScheduleError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.machine import find_device
from prunesearch.models import apply_schedule, input_size
from prunesearch.models.parts import Part, example, sharing_copy
from prunesearch.printable import counted
from prunesearch.profile import Profile
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.agreement import kendall_tau
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS

SCHEDULES, SEED = 8, 0
MOST_ERROR, LEAST_TAU = 0.06, 0.9
SHARES, KEEPS = (0.5, 0.8), (0.5, 0.6, 0.7, 0.8, 0.9)
MAP_SHARES, MAP_KEEPS = (0.75, 0.95), (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
"""`hold` saves the MLPs of one stage of a feature map, so that a schedule costs 74 % of Swin-T's MACs at the least."""
VERBS = ("drop", "fuse", "squeeze", "merge")


@dataclass(frozen=True)
class Row:
    """One cell of the table: predicted and measured speed-ups of the same schedules.

    machine: its processor. measured: means of two measurements, one after the other; halves: the two.
    """

    machine: str
    model: str
    batch: int
    runtime: str
    threads: int
    versions: dict[str, str]
    dense_ms: float
    schedules: list[str]
    predicted: list[float]
    measured: list[float]
    halves: list[list[float]]

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What is measured, and where."""
        return self.machine, self.model, self.batch, self.runtime, self.threads

    @property
    def errors(self) -> list[float]:
        """Shares by which predicted speed-ups are off."""
        return [abs(guess / truth - 1) for guess, truth in zip(self.predicted, self.measured, strict=True)]


def main() -> None:
    """Parse the arguments, measure every cell, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each profile, and again for the schedules")
    parser.add_argument("--again", action="store_true", help="measure rows that the JSON file has already")
    parser.add_argument("--out", type=Path, required=True, help="the page; the rows are in a JSON file beside it")
    parsed = parser.parse_args()
    warnings.simplefilter("ignore")  # random weights of learned parts
    kept = parsed.out.with_suffix(".json")
    found = [Row(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
    rows = {row.key: row for row in found}
    threads = parsed.threads or cores()
    for name, batch, runtime in itertools.product(parsed.models, parsed.batches, parsed.runtimes):
        if (here(), name, batch, runtime, threads) in rows and not parsed.again:
            continue
        row = measure(name, batch, runtime, threads, parsed.seconds)
        rows[row.key] = row
        print(line(row), *details(row), sep="\n", flush=True)
        kept.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1) + "\n")
    parsed.out.write_text(page(list(rows.values()), parsed.seconds))


def here() -> str:
    """The processor of this machine."""
    return processor(find_device("cpu"))


def measure(name: str, batch: int, runtime: str, threads: int, seconds: float) -> Row:
    """Profile a model, then measure schedules of it whole."""
    config = ModelConfig(name)
    (profile,) = measure_profiles(
        config,
        batches=(batch,),
        runtime=runtime,
        device="cpu",
        threads=threads,
        seconds=seconds,
        verbs=verbs_of(config),
        returning=(),
    )
    schedules = [Schedule(), *random_schedules(profile)]
    halves = time_whole(config, schedules, batch, runtime, profile.threads, seconds, times=2)
    speed_ups = [[half[0].seconds / one.seconds for one in half[1:]] for half in halves]
    predicted = total_cost(profile.shape, Schedule(), profile)
    return Row(
        here(),
        name,
        batch,
        runtime,
        threads,
        dict(profile.versions),
        1e3 * mean(half[0].seconds for half in halves),
        [str(schedule) for schedule in schedules[1:]],
        [predicted / total_cost(profile.shape, schedule, profile) for schedule in schedules[1:]],
        [mean(two) for two in zip(*speed_ups, strict=True)],
        speed_ups,
    )


def time_whole(
    config: ModelConfig,
    schedules: Sequence[Schedule],
    batch: int,
    runtime: str,
    threads: int,
    seconds: float,
    times: int = 1,
) -> list[list[Measured]]:
    """Time whole models on the CPU in turns, one with each schedule, so many times. Weights are random.

    seconds: for all times together.
    """
    model = build_model(replace(config, pretrained=False, checkpoint=None)).eval()
    images = example(batch, *input_size(model), like=next(model.parameters()).detach())
    models = [
        apply_schedule(sharing_copy(model), schedule, untrained=True).eval() if schedule.stages else model
        for schedule in schedules
    ]
    settings = Settings(find_device("cpu"), threads)
    with threads_set(settings):
        runs = prepare([Part((one,), (images,)) for one in models], runtime_of(runtime), settings)
        work = dict(enumerate(runs))
        found = [in_turns(work, seconds / times, seed=seed, long=math.inf) for seed in range(times)]
    return [[one[index] for index in range(len(schedules))] for one in found]


def verbs_of(config: ModelConfig) -> list[str] | None:
    """The verbs that are compared; None for a model with a feature map, which has one."""
    from prunesearch.evaluate.shapes import model_shape

    return None if model_shape(config).holds else list(VERBS)


def random_schedules(profile: Profile) -> list[Schedule]:
    """Schedules of one to six stages with one verb each, that cost a share of the dense MACs within SHARES.

    Those of a feature map cost so nearly the same that their order would be chance: they are spread over MAP_SHARES.
    """
    shape, draw = profile.shape, random.Random(SEED)
    (low, high), keeps = (MAP_SHARES, MAP_KEEPS) if shape.holds else (SHARES, KEEPS)
    score = usual_score(shape, [time.name for time in profile.scores])
    dense, found = estimate_cost(shape).macs, {}
    while len(found) < SCHEDULES:
        verb = draw.choice([time.name for time in profile.verbs])
        stages = [stage(verb, block, shape, draw.choice(keeps), score) for block in blocks(draw, shape)]
        schedule = Schedule(tuple(stages))
        try:
            share = estimate_cost(shape, schedule).macs / dense
        except ScheduleError:
            continue
        if low <= share < high:
            place = int(SCHEDULES * (share - low) / (high - low)) if shape.holds else len(found)
            found.setdefault(place, schedule)
    return list(found.values())


def blocks(draw: random.Random, shape: ModelShape) -> list[int]:
    """Blocks of the stages."""
    return sorted(draw.sample(range(shape.depth), min(shape.depth, draw.randint(1, 6))))


def stage(verb: str, block: int, shape: ModelShape, keep: float, score: str) -> Stage:
    """A stage as the profile has measured its verb."""
    score = score if REDUCERS[verb].ranks else "none"
    return Stage(block, at="pre" if shape.holds else "mid", score=score, keep=keep, reduce=verb)


def line(row: Row) -> str:
    """One line of the table."""
    low, high = min(row.measured), max(row.measured)
    return (
        f"| {row.model} | {row.batch} | {row.runtime} | {row.dense_ms:.1f} | {low:.2f} to {high:.2f} | "
        f"{median(row.errors):.1%} | {max(row.errors):.1%} | {tau(row.predicted, row.measured):.2f} | "
        f"{tau(*row.halves):.2f} | {confused(row):.1%} |"
    )


def tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau of two orders, as shown; nan when one of them is no order."""
    value = kendall_tau(list(zip(first, second, strict=True)))
    return math.nan if value is None else round(value, 2)


def confused(row: Row) -> float:
    """The most by which the measured speed-ups of two schedules differ whose predicted order is the other one."""
    pairs = itertools.combinations(zip(row.predicted, row.measured, strict=True), 2)
    wrong = [(one[1], two[1]) for one, two in pairs if (one[0] - two[0]) * (one[1] - two[1]) < 0]
    return max((max(pair) / min(pair) - 1 for pair in wrong), default=0.0)


def details(row: Row) -> list[str]:
    """One line for each schedule."""
    rows = zip(row.predicted, *row.halves, row.schedules, strict=True)
    return [f"    {guess:.3f} predicted, {one:.3f} and {two:.3f} measured: {text}" for guess, one, two, text in rows]


def page(rows: Sequence[Row], seconds: float) -> str:
    """The page, in Markdown."""
    versions = {name: version for row in rows for name, version in row.versions.items()}
    rows = sorted(rows, key=lambda row: (row.model, row.batch))  # stable: machines stay in order
    tables: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.machine, row.threads), []).append(row)
    (low, high), (map_low, map_high) = SHARES, MAP_SHARES
    return f"""# Predicted and measured speed-ups

For each model, batch size and runtime: a profile ({seconds:.0f} s of measuring), and {SCHEDULES} random schedules
(seed {SEED}) of {", ".join(VERBS)}, which cost {low:.0%} to {high:.0%} of the dense model's
MACs, measured whole, in turns with the dense model. A model with a feature map has its own verb, hold, which skips the
MLPs of one of its stages; its schedules are spread over {map_low:.0%} to {map_high:.0%}. Compared is the speed-up over
the dense model, because the speed of a shared machine drifts between the profile and the measurement.
tau: Kendall's, of the predicted and the measured order; again: of the orders of two measurements of the same
schedules, one after the other, which is what tau could be. Confused: the most by which two schedules differ in measured
speed that are predicted in the wrong order; where it is small, tau misses by near ties. Goals: a median error of
{MOST_ERROR:.0%} at most, tau {LEAST_TAU} at least.

float32, {", ".join(map(" ".join, versions.items()))}. Random weights.
{"".join(map(table, tables.values()))}
{elsewhere(rows)}Schedule by schedule: [profile.json](profile.json). Made with `scripts/benchmark_profile.py`, rows in
several sittings.
"""


def elsewhere(rows: Sequence[Row]) -> str:
    """What the rows say that were measured on several machines."""
    reached: dict[str, list[bool]] = {}
    for row in rows:
        reached.setdefault(f"{row.model}, batch {row.batch}, {row.runtime}", []).append(_reaches_goals(row))
    never = [name for name, found in reached.items() if not any(found)]
    once = [name for name, found in reached.items() if any(found) and not all(found)]
    if not once:
        return ""
    return (
        f"Rows that missed on one machine and reach the goals on another: {'; '.join(once)}. Missed wherever they were "
        f"measured: {'; '.join(never) or 'none'}.\n\n"
    )


def verdicts(rows: Sequence[Row]) -> list[str]:
    """How many rows reach the goals, and by what the others miss."""
    missed = [row for row in rows if not _reaches_goals(row)]
    lines = [f"Goals reached: {len(rows) - len(missed)} of {len(rows)}.", *[""] * bool(missed)]
    return lines + [
        f"- missed: {row.model}, batch {row.batch}, {row.runtime}: error {median(row.errors):.1%}, tau "
        f"{tau(row.predicted, row.measured):.2f}; schedules in the wrong order differ by at most {confused(row):.1%}, "
        f"and two measurements agree on the order to {tau(*row.halves):.2f}"
        for row in missed
    ]


def _reaches_goals(row: Row) -> bool:
    return median(row.errors) <= MOST_ERROR and tau(row.predicted, row.measured) >= LEAST_TAU


def table(rows: Sequence[Row]) -> str:
    """The rows of one machine and one number of threads."""
    return f"""
## {rows[0].machine}, {counted(rows[0].threads, "thread")}

| model | batch | runtime | dense, ms | measured speed-ups | median error | largest error | tau | again | confused |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(map(line, rows))}

{chr(10).join(verdicts(rows))}
"""


if __name__ == "__main__":
    main()
