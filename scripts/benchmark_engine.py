#!/usr/bin/env python
"""Run the same search with prunesearch, with plain Optuna and with plain Ray Tune, and compare the time.

    python scripts/benchmark_engine.py --trials 60 --out benchmarks/engine.md

All three propose schedules of search_spaces/digits.yaml, call the same `evaluate` with the same fine-tune, and have two
workers with one thread each. "Plain" means as on the libraries' front pages, with default settings:
`study.optimize(objective, n_jobs=2)` on SQLite, and `Tuner(trainable, search_alg=OptunaSearch(...))`. Each runs in its
own process. The reported time is that of the whole process, from the start of Python to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import optuna
from suggest import suggest

from prunesearch.config import StudyConfig
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import Evaluation, Task, evaluate, model_shape
from prunesearch.evaluate.limits import computed_limits
from prunesearch.files import load_study
from prunesearch.front import dense_of, normalised_hypervolume
from prunesearch.record import Record
from prunesearch.schedule import Schedule
from prunesearch.space.choices import uid_of

STUDY = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"


def study(trials: int) -> StudyConfig:
    return load_study(STUDY, [f"stop.trials={trials}"])


def try_candidate(config: StudyConfig, schedule: Schedule, folder: Path) -> tuple[float, float]:
    """Evaluate a schedule, write the result to `folder`, and return the objectives."""
    task = Task(
        uid=uid_of(schedule, model_shape(config.model)), model=config.model, data=config.data, schedule=schedule,
        budget=config.rungs[0], metrics=config.metric_names, finetune=config.finetune, threads=1, device="cpu",
    )  # fmt: skip
    result = evaluate(task)
    (folder / f"{uuid.uuid4().hex}.result").write_bytes(pickle.dumps((schedule, result)))
    return result.value("top1"), result.value("gmacs")


def run_ours(config: StudyConfig, folder: Path) -> None:
    from prunesearch.search.driver import run_study
    from prunesearch.study.reader import open_study_readonly

    run_study(config, folder)
    for record in open_study_readonly(folder).records():
        (folder / f"{record.uid}.result").write_bytes(pickle.dumps((record.schedule, record.evaluation)))


def run_optuna(config: StudyConfig, folder: Path) -> None:
    shape = model_shape(config.model)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        try:
            schedule = suggest(trial, config.space, shape)
        except ScheduleError as error:
            raise optuna.TrialPruned from error
        return try_candidate(config, schedule, folder)

    search = optuna.create_study(directions=["maximize", "minimize"], storage=f"sqlite:///{folder}/optuna.db")
    search.optimize(objective, n_trials=config.stop.trials, n_jobs=2)


def define_space(trial: optuna.Trial) -> None:
    """The search space for OptunaSearch. At module level, because OptunaSearch pickles it."""
    config = study(1)
    with contextlib.suppress(ScheduleError):  # the trainable handles it
        suggest(trial, config.space, model_shape(config.model))


def run_tune(config: StudyConfig, folder: Path) -> None:
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trainable(parameters: dict[str, Any]) -> None:
        try:
            schedule = suggest(optuna.trial.FixedTrial(parameters), config.space, model_shape(config.model))
        except ScheduleError:
            tune.report({"top1": 0.0, "gmacs": 1.0})
            return
        top1, gmacs = try_candidate(config, schedule, folder)
        tune.report({"top1": top1, "gmacs": gmacs})

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    search = OptunaSearch(space=define_space, metric=["top1", "gmacs"], mode=["max", "min"])
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=config.stop.trials or 1),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    ).fit()


ENGINES = {
    "prunesearch": run_ours,
    "Optuna, `study.optimize(n_jobs=2)`": run_optuna,
    "Ray Tune, `Tuner(OptunaSearch)`": run_tune,
}


def results_in(folder: Path) -> list[tuple[Schedule, Evaluation]]:
    paths = sorted(folder.glob("*.result"), key=lambda path: path.stat().st_mtime_ns)
    return [pickle.loads(path.read_bytes()) for path in paths]


def row(name: str, seconds: float, found: list[tuple[Schedule, Evaluation]], config: StudyConfig, dense: Record) -> str:
    shape = model_shape(config.model)
    limit = dict(computed_limits(config))["gmacs"].at_most or float("inf")
    uids = [uid_of(schedule, shape) for schedule, _ in found]
    within = {uid for uid, (_, result) in zip(uids, found, strict=True) if result.value("gmacs") <= limit}
    over = sum(result.value("gmacs") > limit for _, result in found)
    records = [
        Record(index, uid, schedule, "complete", "sampler", 0, (result,))
        for index, (uid, (schedule, result)) in enumerate(zip(uids, found, strict=True))
    ]
    volume = normalised_hypervolume(records, config.objectives, dense, config.limits)
    waste = f"{(config.stop.trials or 0) - len(found)} | {len(uids) - len(set(uids))} | {over}"
    return f"| {name} | {seconds:.0f} | {waste} | {len(within)} | **{60 * len(within) / seconds:.1f}** | {volume:.4f} |"


PAGE = """\
# The same search with prunesearch, with Optuna used plainly, with Ray Tune used plainly

`search_spaces/digits.yaml`, {trials} trials each, two workers of one thread on 2 CPU cores, one run each, one after the
other, whole processes with their start-up. Useful: distinct schedules within the limit of {limit} GMACs. One run says
little about samplers (that takes many seeds); what the table shows is where the time goes.

| search | seconds | impossible | repeated | over the limit | useful | useful per minute | hypervolume |
|---|---|---|---|---|---|---|---|
{rows}

prunesearch draws again instead of spending a trial on what is impossible, known, or over the limit (the dense model,
which it always evaluates, counts as over), and its workers keep model, data and dense logits. Optuna's threads live in
one process and share these caches here, which is kind to it: there is no second process to start, and evaluations of
two seconds hardly feel the interpreter lock. It also loses what is under way when that process dies. Ray Tune starts a
process for every trial.

Made with `python scripts/benchmark_engine.py --trials {trials}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # internal: arguments of the timed processes
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = study(arguments.trials)
    if arguments.only:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        ENGINES[arguments.only](config, arguments.folder)
        return
    rows: list[str] = []
    dense = None
    with tempfile.TemporaryDirectory() as place:
        for index, name in enumerate(ENGINES):
            folder = Path(place) / str(index)
            folder.mkdir()
            flags = ["--only", name, "--folder", str(folder), "--trials", str(arguments.trials)]
            start = time.perf_counter()
            with (Path(place) / "log").open("w") as log:
                subprocess.run([sys.executable, __file__, *flags], check=True, stdout=log, stderr=log)
            seconds = time.perf_counter() - start
            found = results_in(folder)
            if dense is None:
                first = next(result for schedule, result in found if not schedule.stages)
                dense = dense_of([Record(0, "", Schedule(), "complete", "dense", 0, (first,))])
            assert dense is not None
            rows.append(row(name, seconds, found, config, dense))
            print(rows[-1], flush=True)
    if arguments.out:
        limit = dict(computed_limits(config))["gmacs"].at_most
        arguments.out.write_text(PAGE.format(trials=arguments.trials, rows="\n".join(rows), limit=limit))


if __name__ == "__main__":
    main()
