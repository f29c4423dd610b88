"""Run the candidates of a study in Ray Tune. prunesearch's own search does not use this.

    config = load_study("study.yaml")
    tuner = tune.Tuner(trainable(config), param_space=param_space(config), tune_config=..., run_config=...)
    import_results(tuner.fit(), config, Path("outputs/digits"))

Schedulers, searchers and loggers are Tune's. A trial runs the same evaluations as `run_study` for the same schedule:
one rung per iteration, continued from the checkpoint of the rung below.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from prunesearch.config import StudyConfig
from prunesearch.errors import RunError, ScheduleError, StudyError
from prunesearch.evaluate import METRICS, model_shape
from prunesearch.evaluate.limits import budget_of, computed_excess, computed_limits, excess, measured_relative
from prunesearch.evaluate.outcome import check_evaluation
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record, with_evaluation
from prunesearch.samplers.iso_budget import within_budget
from prunesearch.samplers.propose import seed_of
from prunesearch.schedule import Schedule
from prunesearch.search.problems import check_study, start_schedules
from prunesearch.search.tasks import task_of
from prunesearch.space.choices import Choice, Dimension, dimensions, grid_of, parameters_of, schedule_from, uid_of
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.tune.results import CHECKPOINT, ENTRY, import_results
from prunesearch.workers.protocol import EVALUATE, find_evaluate

__all__ = ["import_results", "param_space", "points_to_evaluate", "trainable"]

WORST = 1e9
"""Value that a failed trial reports for a metric to minimize; -WORST for one to maximize. It is finite, because
schedulers and searchers cannot handle infinity."""


def trainable(config: StudyConfig, evaluate: str = EVALUATE) -> Any:
    """A trainable class for `tune.Tuner` that evaluates candidates of a study, with the resources of one worker.

    Each iteration is a rung. It reports every metric of the study, and

        training_iteration   rung + 1            images   training images seen so far
        feasible             1 within all limits, else 0
        cause                of a failure ("" for none), as in the study; "invalid" for one that was not evaluated
        uid                  of the schedule, as in the study
        prunesearch          what `import_results` reads

    A candidate that fails, does not fit the model or breaks a computable limit is no error for Tune: its trial ends
    with `feasible` 0 and WORST for every metric. A dead process and a full disk are errors. A checkpoint is written
    after every rung, so schedulers can pause trials and Tune can restore them. With `reuse_actors=True` model and
    images stay loaded.

    evaluate: "module:function" of Task -> Evaluation. Raises UserErrors for a study that could not run.
    """
    _check(config)
    settings = {"study": config, "evaluate": evaluate, "directory": os.getcwd(), "import_paths": list(sys.path)}
    candidates = type("Candidate", (_Candidate,), settings)
    workers = config.workers
    return tune.with_resources(candidates, {"cpu": workers.cpus_each, "gpu": workers.gpus_each})


def param_space(config: StudyConfig) -> dict[str, Any]:
    """The parameters of the study's space as Tune domains, flat, with their names in the study.

    Ordered parameters become numbers on their grid, so that searchers see the order. Others become choices.
    """
    _check(config)
    return {name: _domain(dimension) for name, dimension in dimensions(config.space).items()}


def points_to_evaluate(config: StudyConfig) -> list[dict[str, Any]]:
    """The dense model and the start schedules as parameters, for searchers that take `points_to_evaluate`.

    Schedules outside the space have no parameters and are left out (`run_study` evaluates them too).
    """
    _check(config)
    points = [
        parameters_of(schedule, config.space) for _, schedule in start_schedules(config, model_shape(config.model))
    ]
    unique = {json.dumps(point): dict(point) for point in points if point is not None}
    return list(unique.values())


def _check(config: StudyConfig) -> None:
    check_study(config)
    if config.evaluation == "supernet":
        raise StudyError(
            f"study {config.name}: evaluation is supernet, but nobody trains shared weights in Ray Tune. Possible: "
            f"evaluation: finetune here, or `prunesearch run` for this study. Choose one of them."
        )
    relative = measured_relative(config.limits, config.target)
    if relative:
        raise StudyError(
            f"study {config.name}: limits on {', '.join(relative)} are relative to what the dense model is measured "
            f"with, which a trial of Ray Tune does not know. Possible: numbers here, or `prunesearch run` for this "
            f"study. Choose one of them."
        )


def _domain(dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return tune.choice(list(dimension.values))
    low, high, step = dimension.low, dimension.high, dimension.step
    if step is None:
        return tune.loguniform(low, high) if dimension.log else tune.uniform(low, high)
    if math.isclose(low / step, round(low / step)):  # Tune's grids contain 0
        return tune.quniform(low, high, step)
    return tune.choice(list(grid_of(dimension)))


class _Candidate(tune.Trainable):
    """A trial. `trainable` makes a subclass with the study. One process may run several trials in turn."""

    study: StudyConfig
    evaluate: str
    directory: str
    import_paths: list[str]

    def setup(self, config: dict[str, Any]) -> None:
        if not self.study.workers.gpus_each:  # Ray does not hide GPUs from actors without GPUs
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        sys.path += [path for path in self.import_paths if path not in sys.path]
        _check(self.study)  # also imports the plug-ins
        self._shape = model_shape(self.study.model)
        self._start_uids = {uid_of(schedule, self._shape) for _, schedule in start_schedules(self.study, self._shape)}
        self._scratch = Path(tempfile.mkdtemp(prefix="prunesearch-tune-"))
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        shutil.rmtree(self._scratch / "weights", ignore_errors=True)
        self._record: Record | None = None
        self._why = ""
        parameters = {name: new_config[name] for name in dimensions(self.study.space)}
        try:
            schedule = self._schedule(parameters)
        except ScheduleError as error:
            self._why = str(error)
        else:
            uid = uid_of(schedule, self._shape)
            seed = seed_of(self.study.sampler.seed, uid)
            self._record = Record(-1, uid, schedule, "running", "sampler", seed, parameters=parameters)
        return True

    def step(self) -> dict[str, Any]:
        if self._record is None:
            return self._nothing("invalid", self._why)
        record = replace(self._record, rung=self._record.rung_done + 1)
        task = task_of(record, 0, self.study, self._scratch)
        with _working_in(self.directory):
            evaluation = check_evaluation(find_evaluate(self.evaluate)(task), self.study.deciding_metrics)
        if evaluation.cause == "disk":  # not the candidate's fault
            raise RunError(
                f"{self._scratch}: no space is left for weights ({evaluation.error}). Free some space there."
            )
        self._keep(evaluation)
        parameters = dict(record.parameters or {})
        entry = {"task": to_mapping(task), "evaluation": to_mapping(evaluation), "parameters": parameters}
        about = {"uid": task.uid, ENTRY: json.dumps(entry)}
        if evaluation.status == "failed":
            return self._nothing(evaluation.cause or "error", evaluation.error) | about
        values = dict(evaluation.metrics)
        return {
            **values,
            **about,
            "training_iteration": task.rung + 1,
            "images": evaluation.images,
            "feasible": int(all(amount <= 0 for amount in excess(computed_limits(self.study), values).values())),
            "cause": "",
            "done": task.rung == len(self.study.rungs) - 1,
            "should_checkpoint": True,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        evaluations = () if self._record is None else self._record.evaluations
        text = json.dumps([to_mapping(evaluation) for evaluation in evaluations])
        (Path(checkpoint_dir) / f"{CHECKPOINT}.json").write_text(text)
        if evaluations and evaluations[-1].checkpoint is not None:
            for suffix in (".safetensors", ".state"):
                _copy(f"{evaluations[-1].checkpoint}{suffix}", Path(checkpoint_dir) / f"{CHECKPOINT}{suffix}")

    def load_checkpoint(self, checkpoint: Any) -> None:
        source = Path(checkpoint)
        entries = json.loads((source / f"{CHECKPOINT}.json").read_text())
        for entry in entries:
            evaluation = from_mapping(Evaluation, entry, str(source))
            if evaluation.checkpoint is not None:  # the path is of another process, maybe on another machine
                path = self._scratch / "weights" / Path(evaluation.checkpoint).name
                evaluation = replace(evaluation, checkpoint=str(path))
            self._keep(evaluation)
        last = None if self._record is None else self._record.evaluation
        if last is not None and last.checkpoint is not None:
            Path(last.checkpoint).parent.mkdir(exist_ok=True)
            for suffix in (".safetensors", ".state"):
                _copy(source / f"{CHECKPOINT}{suffix}", Path(f"{last.checkpoint}{suffix}"))

    def cleanup(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _schedule(self, parameters: dict[str, Any]) -> Schedule:
        """The schedule of these parameters. Raises ScheduleError for one that `run_study` would not evaluate."""
        study = self.study
        schedule = schedule_from(parameters, study.space, self._shape)
        if uid_of(schedule, self._shape) in self._start_uids:
            return schedule
        budget = budget_of(study)
        if budget is not None:
            schedule = within_budget(schedule, self._shape, budget)
        amounts = computed_excess(computed_limits(study), study.target, schedule)
        over = {name: amount for name, amount in amounts.items() if amount > 0}
        if over:
            said = ", ".join(f"{name} by {amount:.4g}" for name, amount in over.items())
            raise ScheduleError(
                "limits", [f"{schedule} is beyond {said}. Possible: up to the limit. Keep other tokens."]
            )
        return schedule

    def _keep(self, evaluation: Evaluation) -> None:
        assert self._record is not None
        order = len(self._record.evaluations)
        self._record = with_evaluation(self._record, evaluation, order, len(self.study.rungs) - 1)

    def _nothing(self, cause: str, error: str) -> dict[str, Any]:
        goals = {name: METRICS[name].goal for name in self.study.metric_names}
        goals |= {objective.metric: objective.goal for objective in self.study.objectives}
        worst = {name: -WORST if goal == "maximize" else WORST for name, goal in goals.items()}
        return {**worst, "feasible": 0, "cause": cause, "error": error, "images": 0, "done": True}


@contextmanager
def _working_in(directory: str) -> Iterator[None]:
    """Work in the driver's directory, for relative paths in the study file. Tune runs trials in other folders."""
    before = os.getcwd()
    if os.path.isdir(directory):
        os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def _copy(source: str | Path, target: Path) -> None:
    if Path(source).is_file():  # without training there are no weights
        shutil.copyfile(source, target)
