#!/usr/bin/env python
"""A search by predicted latency: does load on the machine change its front, and are the front's points as fast as said?

    python scripts/benchmark_device_search.py --out benchmarks/device_search.md     # digits alone
    python scripts/benchmark_device_search.py --out benchmarks/device_search.md \\
        --cifar10 model.checkpoint=mine.safetensors data.root=train.tar data.val_root=val.tar

For each study: a profile while the machine is idle, and one while every core is busy with something else. The search by
the idle profile, idle and under load; and by the other profile. Then the front's points are timed whole, in turns with
the dense model, while the machine is idle. Everything runs as a user would run it, by the `prunesearch` command. What a
step found is kept in --work: an interrupted run goes on after the last finished step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark_profile import time_whole

from prunesearch.cost import total_cost
from prunesearch.device.profiles import processor
from prunesearch.files import load_profiles, load_study, write_atomically
from prunesearch.printable import counted
from prunesearch.profile import Profile
from prunesearch.report.tables import short
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape
from prunesearch.strict import from_mapping
from prunesearch.study.reader import open_study_readonly

HOME = Path(__file__).parents[1]
METRIC, SHARE = "predicted_latency_ms", "60%"
AGREE = 0.10
"""The goal: ratios to the dense model, and speed-ups, are that close."""
SETS = (
    "objectives=[{metric: agreement, goal: maximize}, {metric: " + METRIC + ", goal: minimize}]",
    "metrics=[top1]",
    "limits={" + METRIC + ": {at_most: " + SHARE + "}}",
    "rungs=[{images: 0}]",  # no training, so that many candidates are seen in a few minutes
    "space.keep=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]",
    "space.score=[class_attention]",
    "space.max_stages=4",  # a stage costs time of its own, so a few strong ones are faster than many gentle ones
    "space.start_from=[]",
    "workers={kind: serial}",
)
"""What is replaced in the study files. They are for MACs and accuracy after training."""
IDLE, LOADED, OTHER = "idle", "under load", "by the profile made under load"
"""The searches."""
BUSY = """
import os
import sys

import numpy as np

parent, core = os.getppid(), int(sys.argv[1])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {core})
square = np.random.default_rng(0).random((400, 400))
print("busy", flush=True)
while os.getppid() == parent:
    square @ square
"""


@dataclass(frozen=True)
class Study:
    """A study that is tried. sets: what is replaced in its file. batch: of the profile."""

    name: str
    file: Path
    sets: tuple[str, ...]
    batch: int


@dataclass(frozen=True)
class Point:
    """A point of a front: its schedule, its metrics, and how many times as fast as the dense model."""

    schedule: Schedule
    metrics: dict[str, float]
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """The share by which the predicted speed-up is off."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Result:
    """What was found for a study. fronts, seconds: by the name of the search. refused: why OTHER was not possible."""

    study: Study
    idle: Profile
    loaded: Profile
    candidates: int
    differences: list[float]
    fronts: dict[str, list[dict[str, Any]]]
    seconds: dict[str, float]
    points: list[Point]
    dense_ms: float
    refused: str


class Failed(Exception):
    """The command line ended with an error."""


# --- arithmetic --------------------------------------------------------------------------------------------------


def share_of_dense(shape: ModelShape, schedule: Schedule, profile: Profile) -> float:
    """Predicted latency as a share of the dense model's."""
    return total_cost(shape, schedule, profile) / total_cost(shape, Schedule(), profile)


def differences(schedules: Sequence[Schedule], idle: Profile, loaded: Profile) -> list[float]:
    """By which share the ratio to the dense model of each schedule is another in the second profile."""
    shape = idle.shape
    return [
        share_of_dense(shape, schedule, loaded) / share_of_dense(shape, schedule, idle) - 1 for schedule in schedules
    ]


def same_schedules(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> int:
    """How many schedules of two fronts are the same."""
    texts = [{json.dumps(row["schedule"], sort_keys=True) for row in rows} for rows in (first, second)]
    return len(texts[0] & texts[1])


def is_same_front(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> bool:
    """Whether two fronts have the same schedules with the same metrics, in the same order."""
    rows = [[(row["schedule"], row["metrics"]) for row in found] for found in (first, second)]
    return rows[0] == rows[1]


# --- steps -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse the arguments, try each study, and write the page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cifar10", nargs="+", metavar="a.b=c", help="try search_spaces/cifar10_vit.yaml too, with its files given so"
    )
    parser.add_argument("--trials", type=int, default=60, help="candidates of a search, the dense model included")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each profile, and for timing a front")
    parser.add_argument("--runtime", default="torch")
    parser.add_argument("--batches", nargs=2, type=int, default=[64, 16], help="digits' and CIFAR-10's; from 16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--work", type=Path, default=Path("outputs/device_search"), help="profiles and studies")
    parser.add_argument("--notes", type=Path, help="Markdown that the page takes over: why goals are missed")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    parsed = parser.parse_args()
    warnings.simplefilter("ignore")  # random weights of learned parts
    common = (*SETS, f"stop.trials={parsed.trials}")
    studies = [Study("digits", HOME / "search_spaces/digits.yaml", common, parsed.batches[0])]
    if parsed.cifar10:
        file = HOME / "search_spaces/cifar10_vit.yaml"
        studies.append(Study("cifar10", file, (*common, *parsed.cifar10), parsed.batches[1]))
    results: list[Result] = []
    for study in studies:
        results.append(try_study(study, parsed))
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        parsed.out.write_text(page(results, parsed), encoding="utf-8")
        print(parsed.out.read_text(encoding="utf-8"), flush=True)


def try_study(study: Study, parsed: argparse.Namespace) -> Result:
    """All steps for one study; those that are done are read from the work folder."""
    work = parsed.work / study.name
    asked = {
        "sets": study.sets, "batch": study.batch, "runtime": parsed.runtime, "threads": parsed.threads,
        "seconds": parsed.seconds,
    }  # fmt: skip
    if kept(work / "asked.json", lambda: asked) != json.loads(json.dumps(asked)):
        sys.exit(f"{work}: it was made with other settings. Possible: another --work. Name one, or delete the folder.")
    profiles = {}
    for name, is_loaded in (("idle", False), ("loaded", True)):
        path = work / f"{name}.json"
        if not path.is_file():
            measure_profile(study, path, is_loaded, parsed)
        (profiles[name],) = load_profiles(path)
    idle, loaded = profiles["idle"], profiles["loaded"]
    fronts, seconds = {}, {}
    for name, profile, is_loaded in ((IDLE, "idle", False), (LOADED, "idle", True), (OTHER, "loaded", False)):
        folder, file = work / name.replace(" ", "_"), work / f"{profile}.json"
        found = kept(folder / "front.json", partial(search, study, folder, file, is_loaded))
        fronts[name], seconds[name] = found["front"], found["seconds"]
    reader = open_study_readonly(next((work / "idle").glob("*/study.db")).parent)
    schedules = [record.outcome for record in reader.records() if record.origin != "dense"]
    reader.close()
    points, dense_ms = timed(study, fronts[IDLE], idle, work, parsed)
    refused, apart = found.get("refused", ""), differences(schedules, idle, loaded)
    return Result(study, idle, loaded, len(schedules), apart, fronts, seconds, points, dense_ms, refused)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The content of a JSON file; it is made if it is missing."""
    if not path.is_file():
        write_atomically(path, json.dumps(make(), indent=1).encode())
    return json.loads(path.read_text(encoding="utf-8"))


def measure_profile(study: Study, path: Path, is_loaded: bool, parsed: argparse.Namespace) -> None:
    """Measure a profile into a file."""
    how = ["--batch", str(study.batch), "--runtime", parsed.runtime, "--threads", str(parsed.threads)]
    with busy() if is_loaded else nullcontext():
        prunesearch(
            "profile", str(study.file), *_sets(study.sets), *how, "--device", "cpu", "--seconds", str(parsed.seconds),
            "--output", str(path),
        )  # fmt: skip


def search(study: Study, folder: Path, profile: Path, is_loaded: bool) -> dict[str, Any]:
    """Run a search from its beginning: its front, its seconds, and why it was refused if it was."""
    shutil.rmtree(folder, ignore_errors=True)  # one that was interrupted may have told its sampler in another order
    sets = _sets((*study.sets, f"device={{profile: '{profile.absolute()}'}}"))
    with busy() if is_loaded else nullcontext():
        begin = time.perf_counter()
        try:
            prunesearch("run", str(study.file), *sets, "--output", str(folder), "--no-progress")
        except Failed as error:
            if profile.stem != "loaded":
                sys.exit(str(error))
            return {"front": [], "seconds": time.perf_counter() - begin, "refused": str(error)}
        seconds = time.perf_counter() - begin
    (done,) = (path.parent for path in folder.glob("*/study.db"))
    return {"front": json.loads(prunesearch("front", str(done), "--json")), "seconds": seconds}


def timed(
    study: Study, rows: Sequence[dict[str, Any]], profile: Profile, work: Path, parsed: argparse.Namespace
) -> tuple[list[Point], float]:
    """The points of a front, with their speed-ups over the dense model; and the dense model's milliseconds."""
    schedules = [from_mapping(Schedule, row["schedule"], study.name) for row in rows]
    config = load_study(study.file, study.sets).model

    def measure() -> list[float]:
        (found,) = time_whole(
            config, [Schedule(), *schedules], study.batch, parsed.runtime, profile.threads, parsed.seconds
        )
        return [1e3 * one.seconds for one in found]

    dense_ms, *ms = kept(work / "timed.json", measure)
    points = [
        Point(schedule, row["metrics"], 1 / share_of_dense(profile.shape, schedule, profile), dense_ms / one)
        for schedule, row, one in zip(schedules, rows, ms, strict=True)
    ]
    return points, dense_ms


def prunesearch(*arguments: str) -> str:
    """Run the command line; returns what it printed. Raises Failed with its last line of error."""
    print(f"prunesearch {' '.join(arguments)}"[:200], file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "prunesearch", *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1].replace(f"{HOME}/", "")
        raise Failed(f"prunesearch {arguments[0]}, exit code {done.returncode}: {last}")
    return done.stdout


@contextmanager
def busy() -> Iterator[None]:
    """Keep every core busy: a process for each multiplies matrices."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", BUSY, str(core)], stdout=subprocess.PIPE, env=environment)
        for core in sorted(os.sched_getaffinity(0))
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        yield
        if any(process.poll() is not None for process in processes):
            sys.exit("a process that should keep a core busy has ended, so the machine was not loaded all the time")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _sets(sets: Sequence[str]) -> list[str]:
    return [text for one in sets for text in ("--set", one)]


# --- the page ----------------------------------------------------------------------------------------------------


def page(results: Sequence[Result], parsed: argparse.Namespace) -> str:
    """The page, in Markdown."""
    packages = dict(pair for result in results for pair in result.idle.versions)
    threads = counted(parsed.threads, "thread")
    notes = "" if parsed.notes is None else f"\n{parsed.notes.read_text(encoding='utf-8').strip()}\n"
    sections = "\n".join(section(result) for result in results)
    sets = "\n".join(f"    --set '{one}'" for one in SETS)
    cifar10 = " --cifar10 model.checkpoint=... data.root=... data.val_root=..." if parsed.cifar10 else ""
    command = (
        f"python scripts/benchmark_device_search.py --trials {parsed.trials} --seconds {parsed.seconds:g} "
        f"--runtime {parsed.runtime} --batches {' '.join(map(str, parsed.batches))} --threads {parsed.threads}"
        f"{cifar10} --out benchmarks/device_search.md"
    )
    return f"""# A search by predicted latency, on an idle and on a loaded machine

Objectives: agreement with the dense model as it comes, and `{METRIC}` of a profile, at most {SHARE} of the dense
model's. Under load means that a process for each core multiplies matrices all the time. A profile is measured for
{parsed.seconds:g} s. A search has {parsed.trials} candidates, serial workers and a fixed seed. Profiles are compared
by their ratios to the dense model, over all candidates of the search. At the end the front's points are timed whole,
in turns with the dense model, while the machine is idle.

{processor(torch.device("cpu"))}, {threads}, {parsed.runtime}, float32, {", ".join(map(" ".join, packages.items()))}.

| study | goal | found | reached |
|---|---|---|---|
{chr(10).join(line for result in results for line in goal_rows(result))}
{notes}
{sections}
Made with `{command}`. The studies are search_spaces/digits.yaml and search_spaces/cifar10_vit.yaml with

{sets}
"""


def goal_rows(result: Result) -> list[str]:
    """The rows of the table of goals for one study."""
    fronts, name = result.fronts, result.study.name
    idle, load = fronts[IDLE], fronts[LOADED]
    is_same = is_same_front(idle, load)
    found = "the same" if is_same else f"{same_schedules(idle, load)} of {len(idle)} and {len(load)} schedules shared"
    apart, off = [abs(one) for one in result.differences], [abs(point.error) for point in result.points]
    return [
        _goal(name, "the same front, idle and under load", f"{found}, {len(idle)} points", bool(idle) and is_same),
        _goal(name, f"ratios of the two profiles agree within {AGREE:.0%}", _spread(apart), _within(apart)),
        _goal(name, f"measured speed of the front within {AGREE:.0%} of predicted", _spread(off), _within(off)),
    ]


def _goal(study: str, goal: str, found: str, is_reached: bool) -> str:
    return f"| {study} | {goal} | {found} | {'yes' if is_reached else '**no**'} |"


def _within(values: Sequence[float]) -> bool:
    return bool(values) and max(values) <= AGREE


def _spread(values: Sequence[float]) -> str:
    """Median and largest of some shares."""
    return f"median {median(values):.1%}, largest {max(values):.1%}" if values else "nothing to compare"


def section(result: Result) -> str:
    """What was found for one study."""
    idle, loaded, fronts = result.idle, result.loaded, result.fronts
    other = fronts[OTHER]
    if result.refused:
        words = f"not there: {result.refused}"
    elif is_same_front(fronts[IDLE], other):
        words = "the same, predicted milliseconds included."
    else:
        shared = same_schedules(fronts[IDLE], other)
        words = f"another: {shared} of its {len(other)} schedules are among the {len(fronts[IDLE])} of the other."
    rows = [
        f"| {short(point.schedule)} | {point.metrics['agreement']:.2f} | {point.metrics['top1']:.2f} | "
        f"{point.metrics[METRIC]:.2f} | {point.predicted:.2f} | {point.measured:.2f} | {point.error:+.1%} |"
        for point in result.points
    ]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
    dense = (
        f"{idle.dense_ms:.1f} ms in the idle profile, {loaded.dense_ms:.1f} ms in the one made under load, "
        f"{result.dense_ms:.1f} ms when the front was timed"
    )
    return f"""## {result.study.name}: {idle.model}, batch {idle.batch}

- The dense model: {dense}.
- The two profiles, over {result.candidates} candidates: {_spread([abs(one) for one in result.differences])}.
- The profiles' own checks (whole schedules against their predictions): idle {_shares(idle.check)};
  under load {_shares(loaded.check)}.
- Searches: {seconds}.
- The front of a search by the profile that was made under load is {words}
  It need not be the same: candidates whose predictions are close change places, and some are then beyond the limit.

| front, idle | agreement, % | top-1, % | predicted, ms | predicted speed-up | measured speed-up | error |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _shares(values: Sequence[float]) -> str:
    return " and ".join(f"{value:+.1%}" for value in values) or "none"


if __name__ == "__main__":
    main()
