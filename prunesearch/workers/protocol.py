"""What the driver needs of workers, whether they live in this process or on a cluster."""

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


@dataclass(frozen=True)
class Lost:
    """A task that brings no evaluation: its worker died (crash) or took too long (timeout). `error` is for people."""

    cause: Cause
    error: str


Outcome = tuple[Task, "Evaluation | Lost"]


class Workers(Protocol):
    """Slots that evaluate tasks. The result is in the outbox before `wait` gives it."""

    count: int
    description: str

    def submit(self, task: Task) -> None:
        """Start a task on a free slot; at most `count` are under way at once."""

    def wait(self, seconds: float) -> list[Outcome]:
        """What finished; waits up to so long for the first one, and may give nothing."""

    def close(self) -> None:
        """Stop everything, also what is under way."""


class NoWorkers:
    """For a study in which nothing is left to do: Ray takes seconds to start."""

    count = 1
    description = "no workers needed"

    def submit(self, task: Task) -> None:
        raise AssertionError("nothing is left to evaluate")

    def wait(self, seconds: float) -> list[Outcome]:
        return []

    def close(self) -> None:
        return None


def refuse_many(config: WorkersConfig) -> None:
    """Raises ResourceError when kind serial is asked for several workers."""
    if config.count not in (None, 1):
        raise ResourceError(
            f"workers.count: {config.count}, but kind serial evaluates one by one. Possible with kind: ray. Use that, "
            f"or leave count out."
        )


def took_too_long(task: Task, since: float, timeout: float | None) -> Lost | None:
    """Whether a task that began at `since` (of `time.monotonic`) counts as hung; shared weights take as long as they
    take."""
    if timeout is None or task.supernet is not None or time.monotonic() - since <= timeout:
        return None
    return Lost("timeout", f"no result after {timeout:g} s")


def spoils_its_process(evaluation: Evaluation) -> bool:
    """Whether the process that brought this evaluation has its memory or its CUDA context in disorder."""
    return evaluation.cause == "oom" or "CUDA error" in evaluation.error


def log_to(path: Path) -> None:
    """Everything this process says, also in its last moment, goes to a file of the study."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    faulthandler.enable(file=2)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True)


def find_evaluate(path: str) -> Callable[[Task], Evaluation]:
    """The function that "module:name" names."""
    module, _, name = path.partition(":")
    function: Callable[[Task], Evaluation] = getattr(importlib.import_module(module), name)
    return function
