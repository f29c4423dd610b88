"""Compare what device profiles predict with what is measured: speed-ups of random schedules, model by model.

    python scripts/benchmark_profile.py --models deit_tiny_patch16_224 --batches 1 --out benchmarks/profile.md

Each row profiles a model, then measures the dense model and SCHEDULES random schedules whole, in turns. The schedules
cost 50 to 80 % of the dense model's MACs. What is compared is the speed-up over the dense model, so that the present
speed of the machine divides out. Weights are random, because time does not depend on them.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from prunesearch.config import ModelConfig
from prunesearch.cost import estimate_cost, total_cost
from prunesearch.device.measure import usual_score
from prunesearch.device.profiles import measure_profiles, processor
from prunesearch.device.runtimes import Settings, prepare, runtime_of, threads_set
from prunesearch.device.timing import Measured, in_turns
from prunesearch.errors import ScheduleError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.machine import find_device
from prunesearch.models import apply_schedule, input_size
from prunesearch.models.parts import Part, example, sharing_copy
from prunesearch.profile import Profile
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.agreement import kendall_tau
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS

SCHEDULES, SEED = 8, 0
SHARES = (0.5, 0.8)
VERBS = ("drop", "fuse", "squeeze", "merge")


@dataclass(frozen=True)
class Row:
    """One cell of the table: predicted and measured speed-ups of the same schedules."""

    profile: Profile
    predicted: list[float]
    measured: list[float]
    dense_ms: float

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
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    rows = []
    warnings.simplefilter("ignore")  # random weights of learned parts
    for name in parsed.models:
        for batch in parsed.batches:
            for runtime in parsed.runtimes:
                rows.append(measure(name, batch, runtime, parsed.threads, parsed.seconds))
                print(line(rows[-1]), flush=True)
                parsed.out.write_text(page(rows, parsed))


def measure(name: str, batch: int, runtime: str, threads: int | None, seconds: float) -> Row:
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
    )
    schedules = [Schedule(), *random_schedules(profile)]
    found = time_whole(config, schedules, batch, runtime, profile.threads, seconds)
    dense, predicted = found[0].seconds, total_cost(profile.shape, Schedule(), profile)
    return Row(
        profile,
        [predicted / total_cost(profile.shape, schedule, profile) for schedule in schedules[1:]],
        [dense / found[index].seconds for index in range(1, len(schedules))],
        1e3 * dense,
    )


def time_whole(
    config: ModelConfig, schedules: Sequence[Schedule], batch: int, runtime: str, threads: int, seconds: float
) -> list[Measured]:
    """Time whole models on the CPU in turns, one with each schedule. Weights are random."""
    model = build_model(replace(config, pretrained=False, checkpoint=None)).eval()
    images = example(batch, *input_size(model), like=next(model.parameters()).detach())
    models = [
        apply_schedule(sharing_copy(model), schedule, untrained=True).eval() if schedule.stages else model
        for schedule in schedules
    ]
    settings = Settings(find_device("cpu"), threads)
    with threads_set(settings):
        runs = prepare([Part((one,), (images,)) for one in models], runtime_of(runtime), settings)
        found = in_turns(dict(enumerate(runs)), seconds)
    return [found[index] for index in range(len(schedules))]


def verbs_of(config: ModelConfig) -> list[str] | None:
    """The verbs that are compared; None for a model with a feature map, which has one."""
    from prunesearch.evaluate.shapes import model_shape

    return None if model_shape(config).holds else list(VERBS)


def random_schedules(profile: Profile) -> list[Schedule]:
    """Schedules of one to six stages with one verb each, that cost a share of the dense MACs within SHARES."""
    shape, draw = profile.shape, random.Random(SEED)
    score = usual_score(shape, [time.name for time in profile.scores])
    dense, found = estimate_cost(shape).macs, []
    while len(found) < SCHEDULES:
        verb = draw.choice([time.name for time in profile.verbs])
        stages = [
            stage(verb, block, shape, draw.choice((0.5, 0.6, 0.7, 0.8, 0.9)), score) for block in blocks(draw, shape)
        ]
        schedule = Schedule(tuple(stages))
        try:
            share = estimate_cost(shape, schedule).macs / dense
        except ScheduleError:
            continue
        if SHARES[0] <= share <= SHARES[1]:
            found.append(schedule)
    return found


def blocks(draw: random.Random, shape: ModelShape) -> list[int]:
    """Blocks of the stages."""
    return sorted(draw.sample(range(shape.depth), min(shape.depth, draw.randint(1, 6))))


def stage(verb: str, block: int, shape: ModelShape, keep: float, score: str) -> Stage:
    """A stage as the profile has measured its verb."""
    score = score if REDUCERS[verb].ranks else "none"
    return Stage(block, at="pre" if shape.holds else "mid", score=score, keep=keep, reduce=verb)


def line(row: Row) -> str:
    """One line of the table."""
    profile = row.profile
    tau = kendall_tau(list(zip(row.predicted, row.measured, strict=True)))
    low, high = min(row.measured), max(row.measured)
    return (
        f"| {profile.model} | {profile.batch} | {profile.runtime} | {row.dense_ms:.1f} | {low:.2f} to {high:.2f} | "
        f"{median(row.errors):.1%} | {max(row.errors):.1%} | {'' if tau is None else f'{tau:.2f}'} |"
    )


def page(rows: Sequence[Row], parsed: argparse.Namespace) -> str:
    """The page, in Markdown."""
    first = rows[0].profile
    versions = dict(pair for row in rows for pair in row.profile.versions)
    threads = "" if parsed.threads is None else f" --threads {parsed.threads}"
    command = (
        f"python scripts/benchmark_profile.py --models {' '.join(parsed.models)} --batches "
        f"{' '.join(map(str, parsed.batches))} --runtimes {' '.join(parsed.runtimes)}{threads} "
        f"--seconds {parsed.seconds:g} --out benchmarks/profile.md"
    )
    low, high = SHARES
    machine = f"{processor(find_device('cpu'))}, {first.threads} thread{'s' * (first.threads != 1)}"
    return f"""# Predicted and measured speed-ups

For each model, batch size and runtime: a profile ({parsed.seconds:.0f} s of measuring), and {SCHEDULES} random
schedules (seed {SEED}) of {", ".join(VERBS)}, which cost {low:.0%} to {high:.0%} of the dense
model's MACs, measured whole, in turns with the dense model. Compared is the speed-up over the dense model, because the
speed of a shared machine drifts between the profile and the measurement. tau: Kendall's, of the two orders.

{machine}, float32, {", ".join(map(" ".join, versions.items()))}.
Random weights.

| model | batch | runtime | dense, ms | measured speed-ups | median error | largest error | tau |
|---|---|---|---|---|---|---|---|
{chr(10).join(map(line, rows))}

Made with `{command}`.
"""


if __name__ == "__main__":
    main()
