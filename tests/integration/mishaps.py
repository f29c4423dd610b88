"""Evaluations that go wrong in a way that depends on nothing but the candidate."""

from __future__ import annotations

import os
import signal
import time

from prunesearch.evaluate.task import Evaluation, Task

KINDS = ("fine", "dies once", "dies always", "hangs", "raises", "runs out of memory")


def mishap(uid: str) -> str:
    """What happens to a candidate."""
    number = int(uid, 16) % 19
    return KINDS[number] if number < len(KINDS) else "fine"


def evaluate(task: Task) -> Evaluation:
    """Made-up numbers, or none."""
    kind = mishap(task.uid)
    if kind == "dies always" or (kind == "dies once" and task.attempt == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hangs":
        time.sleep(1000)
    if kind == "raises":
        raise ArithmeticError("raised in the evaluation")
    failed = kind == "runs out of memory"
    return Evaluation(
        task.uid,
        status="failed" if failed else "complete",
        cause="oom" if failed else None,
        attempt=task.attempt,
        metrics=() if failed else (("gmacs", 1.0 * len(task.schedule.stages)), ("top1", 90.0)),
        host=f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}",
    )
