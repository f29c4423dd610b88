"""A worker in a child process: one task at a time. A crash or a hang there fails the candidate, not the driver.

The child stays alive between tasks and keeps model and data loaded. It is restarted after it died. It has its own
session, so Ctrl-C in a terminal reaches only the driver. When the driver ends, even by a kill, the child and all
processes that it started end too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from prunesearch.config import WorkersConfig
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.workers.outbox import evaluate_into
from prunesearch.workers.protocol import (
    EVALUATE,
    Lost,
    Outcome,
    find_evaluate,
    log_to,
    refuse_many,
    spoils_its_process,
    took_too_long,
)

START_SECONDS = 600.0
"""How long a child may take to start. Imports are slow on a cold disk."""
_context = multiprocessing.get_context("spawn")  # CUDA does not work in forked children


class ChildWorker:
    """One worker in a child process. Raises ResourceError when the config asks for several.

    folder: of the study. The child's output is written to logs/worker-0.log there.
    """

    count = 1
    description = "a child process"

    def __init__(self, config: WorkersConfig, folder: Path, outbox: Path, evaluate: str = EVALUATE) -> None:
        refuse_many(config)
        self._timeout = config.timeout
        self._arguments = (outbox, evaluate, folder / "logs" / "worker-0.log")
        self._tasks: deque[Task] = deque()
        self._child: _Child | None = None

    def submit(self, task: Task) -> None:
        self._tasks.append(task)

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._tasks:
            return []
        task = self._tasks[0]
        if self._child is None:
            self._child = _Child(*self._arguments)
        try:
            outcome = self._child.outcome(task, seconds, self._timeout)
        except EOFError:
            outcome = Lost("crash", f"its process ended: {self._child.how_it_ended()}")
        if outcome is None:
            return []
        is_lost = isinstance(outcome, Lost) and outcome.cause != "error"
        if is_lost or (isinstance(outcome, Evaluation) and spoils_its_process(outcome)):
            self._end_child()
        return [(self._tasks.popleft(), outcome)]

    def close(self) -> None:
        self._tasks.clear()
        self._end_child()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    """The child process and its current task. Methods that read from it raise EOFError when it has ended."""

    def __init__(self, outbox: Path, evaluate: str, log: Path) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_work, args=(theirs, outbox, evaluate, log), name="prunesearch worker")
        self._process.start()
        theirs.close()
        self._since = time.monotonic()
        self._is_ready = self._is_busy = False

    def outcome(self, task: Task, seconds: float, timeout: float | None) -> Evaluation | Lost | None:
        """Send the task if that was not done yet, and wait for its outcome; None while it runs."""
        if not self._is_ready:
            if self._receive(seconds) is None:
                over = time.monotonic() - self._since > START_SECONDS
                return Lost("timeout", f"its process did not start in {START_SECONDS:g} s") if over else None
            self._is_ready = True
        if not self._is_busy:
            try:
                self._pipe.send(task)
            except OSError:
                raise EOFError from None
            self._is_busy, self._since = True, time.monotonic()
        found = self._receive(seconds)
        if found is not None:
            self._is_busy = False
            return found
        return took_too_long(task, self._since, timeout)

    def how_it_ended(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        main = "a script that calls run_study does so under if __name__ == '__main__'"
        return how if self._is_ready else f"{how}, before it could evaluate ({main})"

    def end(self) -> None:
        """Kill the process and its children."""
        if self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # in case it has no process group of its own yet
        self._process.join()
        self._process.close()
        self._pipe.close()

    def _receive(self, seconds: float) -> Evaluation | Lost | None:
        """The next message of the child; None when there is none within `seconds`."""
        try:
            said: Evaluation | Lost | None = self._pipe.recv() if self._pipe.poll(seconds) else None
        except OSError:
            raise EOFError from None
        return said


def _work(driver: Connection, outbox: Path, evaluate: str, log: Path) -> None:
    """Main function of the child: evaluate tasks until the driver closes the pipe."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):  # only the driver may interrupt a task
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, name="end with the driver", daemon=True).start()
    log_to(log)
    function = find_evaluate(evaluate)
    driver.send(Lost("error", "ready"))
    while True:
        try:
            task = driver.recv()
        except EOFError:
            return
        outcome: Evaluation | Lost
        try:
            outcome = evaluate_into(outbox, function, task)
        except BaseException as error:
            outcome = Lost("error", f"{type(error).__name__}: {error}")
        driver.send(outcome)


def _end_with_driver() -> None:
    """Wait until the driver has ended, then kill this process and all processes that it started."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a child"
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
