"""The worker in the driver's own process: one task at a time, evaluated inside `wait`. For small studies and debugging.

An evaluation that kills or hangs its process kills or hangs the driver. Studies with plug-ins or a timeout use the
worker in `child.py`.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

from prunesearch.config import WorkersConfig
from prunesearch.errors import ResourceError
from prunesearch.evaluate.task import Task
from prunesearch.workers.outbox import evaluate_into
from prunesearch.workers.protocol import EVALUATE, Lost, Outcome, find_evaluate, refuse_many


class SerialWorkers:
    """One worker in this process. Raises ResourceError when the config asks for several workers or a timeout."""

    count = 1

    def __init__(self, config: WorkersConfig, outbox: Path, evaluate: str = EVALUATE) -> None:
        refuse_many(config)
        if config.timeout is not None:
            raise ResourceError(
                f"workers.timeout: {config.timeout:g}, but an evaluation in this process cannot be stopped from "
                f"outside. Possible: a ChildWorker. Take one, or leave timeout out."
            )
        self.description = "this process"
        self._outbox, self._evaluate = outbox, find_evaluate(evaluate)
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._tasks:
            return []
        task = self._tasks.popleft()
        try:
            return [(task, evaluate_into(self._outbox, self._evaluate, task))]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # e.g. SystemExit, which must not end the search
            return [(task, Lost("error", f"{type(error).__name__}: {error}"))]

    def close(self) -> None:
        self._tasks.clear()
