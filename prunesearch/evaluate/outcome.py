"""Decide whether an evaluation counts as complete, and whether two tasks must give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from prunesearch.evaluate.task import Cause, Evaluation, Task


def check_evaluation(evaluation: Evaluation, needed: Iterable[str]) -> Evaluation:
    """The evaluation, turned into a failed one when a needed metric is missing or not finite.

    needed: for a study, `StudyConfig.deciding_metrics`.
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
    """A failed evaluation for a task that returned none."""
    return Evaluation(task.uid, "failed", rung=task.rung, attempt=task.attempt, cause=cause, error=error)


def same_work(task: Task, expected: Task) -> bool:
    """Whether two tasks must give the same numbers. Device, loading and the location of images do not matter."""

    def work(task: Task) -> tuple[object, ...]:
        data = replace(task.data, root=None, val_root=None, test_root=None, loaders=0, in_memory=True)
        shares = task.start is not None
        return (task.uid, task.seed, task.rung, task.model, data, task.budget, task.finetune, task.measure, shares)

    return work(task) == work(expected)


def hopeless(failures: list[Evaluation]) -> str:
    """The error message when every candidate of a run failed."""
    last = failures[-1]
    where = f" at rung {last.rung}" if last.rung else ""
    trace = f"\n{last.traceback}" if last.traceback else ""
    return (
        f"no candidate could be evaluated{where}: {len(failures)} of {len(failures)} failed in this run. The last "
        f"error ({last.cause}): {last.error.rstrip('.')}. Mend its cause and run the study again; it continues.{trace}"
    )
