#!/usr/bin/env python
"""The same search, three ways, one after the other: prunesearch, Optuna used plainly, Ray Tune used plainly.

    python scripts/benchmark_engine.py --trials 32 --out benchmarks/engine.md

All three propose schedules of search_spaces/digits.yaml, call the same `evaluate` with the same fine-tune, and have two
workers of one thread. "Plainly" is what the libraries' front pages show: `study.optimize(objective, n_jobs=2)` on SQLite, and
`Tuner(trainable, search_alg=OptunaSearch(...))`, each with its defaults.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from prunesearch.config import StudyConfig
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import Evaluation, Task, evaluate, model_shape
from prunesearch.files import load_study
from prunesearch.front import dense_of, normalised_hypervolume
from prunesearch.schedule import Schedule
from prunesearch.search.record import Record
from prunesearch.space import suggest, uid_of

STUDY = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"


@dataclass
class Outcome:
    """What a search did with its time."""

    name: str
    seconds: float
    evaluated: list[tuple[Schedule, Evaluation]]
    impossible: int


def task(config: StudyConfig, schedule: Schedule) -> Task:
    return Task(
        uid="benchmark", model=config.model, data=config.data, schedule=schedule, budget=config.rungs[0],
        metrics=config.metric_names, finetune=config.finetune, threads=1, device="cpu",
    )  # fmt: skip


def ours(config: StudyConfig, folder: Path) -> Outcome:
    from prunesearch.search.driver import run_study
    from prunesearch.search.study import open_study_readonly

    start = time.perf_counter()
    run_study(config, folder)
    seconds = time.perf_counter() - start
    records = open_study_readonly(folder).records()
    return Outcome("prunesearch", seconds, [(r.schedule, r.evaluation) for r in records if r.evaluation], 0)


def plain_optuna(config: StudyConfig, folder: Path) -> Outcome:
    shape = model_shape(config.model)
    evaluated: list[tuple[Schedule, Evaluation]] = []
    impossible = 0

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        nonlocal impossible
        try:
            schedule = suggest(trial, config.space, shape)
        except ScheduleError as error:
            impossible += 1
            raise optuna.TrialPruned from error
        result = evaluate(task(config, schedule))
        evaluated.append((schedule, result))
        return result.value("top1"), result.value("gmacs")

    start = time.perf_counter()
    study = optuna.create_study(directions=["maximize", "minimize"], storage=f"sqlite:///{folder}/optuna.db")
    study.optimize(objective, n_trials=config.stop.trials, n_jobs=2)
    return Outcome("Optuna, `study.optimize(n_jobs=2)`", time.perf_counter() - start, evaluated, impossible)


def plain_tune(config: StudyConfig, folder: Path) -> Outcome:
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    shape = model_shape(config.model)
    results = folder / "results"
    results.mkdir()

    def define(trial: optuna.Trial) -> None:
        try:
            suggest(trial, config.space, shape)
        except ScheduleError:
            pass  # the trainable will find out

    def trainable(parameters: dict[str, Any]) -> None:
        import pickle
        import uuid

        try:
            schedule = suggest(optuna.trial.FixedTrial(parameters), config.space, model_shape(config.model))
        except ScheduleError:
            tune.report({"top1": 0.0, "gmacs": 1.0})
            return
        result = evaluate(task(config, schedule))
        (results / uuid.uuid4().hex).write_bytes(pickle.dumps((schedule, result)))
        tune.report({"top1": result.value("top1"), "gmacs": result.value("gmacs")})

    start = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    search = OptunaSearch(space=define, metric=["top1", "gmacs"], mode=["max", "min"])
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=config.stop.trials or 1),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    )
    tuner.fit()
    seconds = time.perf_counter() - start
    ray.shutdown()
    import pickle

    evaluated = [pickle.loads(path.read_bytes()) for path in results.iterdir()]
    return Outcome("Ray Tune, `Tuner(OptunaSearch)`", seconds, evaluated, (config.stop.trials or 0) - len(evaluated))


def row(outcome: Outcome, config: StudyConfig, dense: Record) -> str:
    shape = model_shape(config.model)
    limit = dict(config.limits)["gmacs"].at_most or float("inf")
    over = sum(result.value("gmacs") > limit for _, result in outcome.evaluated)
    uids = [uid_of(schedule, shape) for schedule, _ in outcome.evaluated]
    records = [
        Record(index, uid, schedule, "complete", "sampler", 0, (result,))
        for index, (uid, (schedule, result)) in enumerate(zip(uids, outcome.evaluated, strict=True))
    ]
    volume = normalised_hypervolume(records, config.objectives, dense, config.limits)
    useful = len(
        {uid for uid, (_, result) in zip(uids, outcome.evaluated, strict=True) if result.value("gmacs") <= limit}
    )
    rate = 60 * useful / outcome.seconds
    return (
        f"| {outcome.name} | {outcome.seconds:.0f} | {len(outcome.evaluated)} | {outcome.impossible} | "
        f"{len(uids) - len(set(uids))} | {over} | **{rate:.1f}** | {volume:.4f} |"
    )


PAGE = """\
# The same search with prunesearch, with Optuna used plainly, with Ray Tune used plainly

`search_spaces/digits.yaml`, {trials} trials each, two workers of one thread, one run each, in one process after the other, start-up
included; the machine has 2 cores. Useful: distinct schedules within the limit of {limit} GMACs. The hypervolume of one run
of {trials} trials says little about samplers (that takes many seeds); what the table shows is where the time goes.

| search | seconds | evaluated | impossible | repeated | over the limit | useful per minute | hypervolume |
|---|---|---|---|---|---|---|---|
{rows}

prunesearch starts from the published schedules of the file and the dense model, draws again instead of training what is
impossible, known, or over the limit, and its workers keep model, data and dense logits. Optuna's threads share one process
and its caches here, which is kind to it, but not its interpreter lock; Ray Tune starts a process for each trial.

Made with `python scripts/benchmark_engine.py --trials {trials}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = load_study(STUDY, [f"stop.trials={arguments.trials}"])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        first = ours(replace(config, name="ours"), Path(place) / "ours")
        records = [Record(0, "", Schedule(), "complete", "dense", 0, (r,)) for s, r in first.evaluated if not s.stages]
        dense = dense_of(records)
        assert dense is not None
        for run in (None, plain_optuna, plain_tune):
            folder = Path(place) / (run.__name__ if run else "ours")
            folder.mkdir(exist_ok=True)
            rows.append(row(run(config, folder) if run else first, config, dense))
            print(rows[-1], flush=True)
    if arguments.out:
        limit = dict(config.limits)["gmacs"].at_most
        arguments.out.write_text(PAGE.format(trials=arguments.trials, rows="\n".join(rows), limit=limit))


if __name__ == "__main__":
    main()
