"""Decide whether an evaluation counts as complete, and whether two tasks must give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from prunesearch.evaluate.task import Cause, Evaluation, Task


def check_evaluation(evaluation: Evaluation, needed: Iterable[str]) -> Evaluation:
    """The evaluation, failed when it lacks a finite number for one of the metrics that are needed.

    needed: of a study, `StudyConfig.deciding_metrics`.
    """
    if evaluation.status == "failed":
        return evaluation
    values = dict(evaluation.metrics)
    for name in needed:
        if name not in values:
            return replace(evaluation, status="failed", cause="error", error=f"metric {name} was not measured")
        if not math.isfinite(values[name]):
            return replace(evaluation, status="failed", cause="nan", error=f"metric {name} is {values[name]}")
    return evaluation


def failed(task: Task, cause: Cause, error: str) -> Evaluation:
    """The evaluation of a task that brought none."""
    return Evaluation(task.uid, "failed", rung=task.rung, attempt=task.attempt, cause=cause, error=error)


def same_work(task: Task, expected: Task) -> bool:
    """Whether two tasks must give the same numbers; where and how fast they run does not
    matter, nor where the images lie."""

    def work(task: Task) -> tuple[object, ...]:
        data = replace(task.data, root=None, val_root=None, test_root=None, loaders=0, in_memory=True)
        shares = task.start is not None
        return (task.uid, task.seed, task.rung, task.model, data, task.budget, task.finetune, task.measure, shares)

    return work(task) == work(expected)


def hopeless(failures: list[Evaluation]) -> str:
    """What to say when every candidate of a run failed, at their rung."""
    last = failures[-1]
    where = f" at rung {last.rung}" if last.rung else ""
    trace = f"\n{last.traceback}" if last.traceback else ""
    return (
        f"no candidate could be evaluated{where}: {len(failures)} of {len(failures)} failed in this run. The last "
        f"error ({last.cause}): {last.error}. Mend its cause and run the study again; it continues.{trace}"
    )
