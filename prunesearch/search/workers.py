"""What the driver needs of workers, whether they live in this process or on a cluster."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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


def find_evaluate(path: str) -> Callable[[Task], Evaluation]:
    """The function that "module:name" names."""
    module, _, name = path.partition(":")
    function: Callable[[Task], Evaluation] = getattr(importlib.import_module(module), name)
    return function
