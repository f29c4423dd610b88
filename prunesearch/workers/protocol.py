"""The `Workers` protocol between driver and workers, and what all kinds of workers share."""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prunesearch.config import WorkersConfig
from prunesearch.errors import ResourceError
from prunesearch.evaluate.task import Cause, Evaluation, Task

EVALUATE = "prunesearch.evaluate:evaluate"
TIME = "prunesearch.device.whole_models:evaluate"


@dataclass(frozen=True)
class Lost:
    """The outcome of a task without an evaluation: its worker died (crash), took too long (timeout) or raised (error).

    error: text to show.
    """

    cause: Cause
    error: str


Outcome = tuple[Task, "Evaluation | Lost"]


class Workers(Protocol):
    """Workers that evaluate tasks. A result is in the outbox before `wait` returns it.

    count: tasks that run at once. description: text to show.
    """

    count: int
    description: str

    def submit(self, task: Task) -> None:
        """Start a task on a free worker. The caller submits at most `count` tasks at once."""

    def wait(self, seconds: float) -> list[Outcome]:
        """The tasks that finished, with their outcomes. Waits up to `seconds` for the first one; may be empty."""

    def close(self) -> None:
        """Stop all workers, running tasks included."""


class NoWorkers:
    """Workers for a study without work left. They avoid starting Ray, which takes seconds."""

    count = 1
    description = "no workers needed"

    def submit(self, task: Task) -> None:
        raise AssertionError("nothing is left to evaluate")

    def wait(self, seconds: float) -> list[Outcome]:
        return []

    def close(self) -> None:
        return None


class LateWorkers:
    """One worker that `make` starts when it gets its first task: others may time theirs on this machine before."""

    count = 1
    description = "not started yet"

    def __init__(self, make: Callable[[], Workers]) -> None:
        self._make = make
        self._workers: Workers | None = None

    def submit(self, task: Task) -> None:
        if self._workers is None:
            self._workers = self._make()
        self._workers.submit(task)

    def wait(self, seconds: float) -> list[Outcome]:
        return [] if self._workers is None else self._workers.wait(seconds)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


def refuse_many(config: WorkersConfig) -> None:
    """Raise ResourceError when several workers of kind serial are asked for."""
    if config.count not in (None, 1):
        raise ResourceError(
            f"workers.count: {config.count}, but kind serial evaluates one by one. Possible with kind: ray. Use that, "
            f"or leave count out."
        )


def took_too_long(task: Task, since: float, timeout: float | None) -> Lost | None:
    """`Lost` when a task has run for more than `timeout` seconds, else None. Candidates have a timeout, other tasks
    have none: training shared weights and timing.

    since: when it began, as `time.monotonic()`.
    """
    if timeout is None or (task.supernet or task.timing) is not None or time.monotonic() - since <= timeout:
        return None
    return Lost("timeout", f"no result after {timeout:g} s")


def spoils_its_process(evaluation: Evaluation) -> bool:
    """Whether the worker process must be replaced after this evaluation: out of memory, or a broken CUDA context."""
    return evaluation.cause == "oom" or "CUDA error" in evaluation.error


def log_to(path: Path) -> None:
    """Append all output of this process to a file: stdout, stderr, log messages and tracebacks of fatal signals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    faulthandler.enable(file=2)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True)


def find_evaluate(path: str) -> Callable[[Task], Evaluation]:
    """Import the function named by "module:name"."""
    module, _, name = path.partition(":")
    function: Callable[[Task], Evaluation] = getattr(importlib.import_module(module), name)
    return function
