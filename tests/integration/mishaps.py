"""Evaluations that fail in different ways. The way depends on the candidate's uid only."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

from prunesearch.evaluate.task import Evaluation, Task

KINDS = {
    1: "dies once",
    2: "dies always",
    3: "hangs",
    4: "raises",
    5: "runs out of memory",
    9: "reports infinity",
    13: "raises what cannot be pickled",
    17: "reports NaN",
}


def mishap(uid: str) -> str:
    """The kind of failure of a candidate."""
    return KINDS.get(int(uid, 16) % 19, "fine")


class Unpicklable(Exception):
    """An object that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def evaluate(task: Task) -> Evaluation:
    """Return made-up numbers, or fail."""
    kind = mishap(task.uid)
    if kind == "dies always" or (kind == "dies once" and task.attempt == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hangs":
        time.sleep(1000)
    if kind == "raises":
        raise ArithmeticError("raised in the evaluation")
    if kind == "raises what cannot be pickled":
        raise Unpicklable
    top1 = {"reports NaN": math.nan, "reports infinity": math.inf}.get(kind, 90.0)
    failed = kind == "runs out of memory"
    return Evaluation(
        task.uid,
        status="failed" if failed else "complete",
        cause="oom" if failed else None,
        attempt=task.attempt,
        metrics=() if failed else (("gmacs", 1.0 * len(task.schedule.stages)), ("top1", top1)),
        host=f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}",
    )
