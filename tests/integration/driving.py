"""A driver as a process, for tests with several: a fake study whose evaluations are logged in a ledger file.

Each line of the ledger has an event, uid, rung, process, a token unique to the evaluation, and the time. Events:

    begun     the evaluation began ("known" instead if its result was already in an outbox)
    returned  the evaluation returned
    written   its result is in the outbox
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.record import Record
from prunesearch.search.driver import run_study
from prunesearch.study.reader import open_study_readonly
from prunesearch.workers import serial as serial_workers
from prunesearch.workers.outbox import evaluate_into

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import fake_search

_context = get_context("forkserver")
_context.set_forkserver_preload(["prunesearch.search.driver", "prunesearch.study.store"])  # imports take seconds
BEGUN = ("begun", "known")
_seconds = 0.0
_ledger = Path()


@dataclass(frozen=True)
class Line:
    """A line of the ledger."""

    what: str
    uid: str
    rung: int
    process: int
    token: str
    time: float


def evaluate(task: Task) -> Evaluation:
    """Log the evaluation in the ledger, and wait a moment."""
    token = uuid.uuid4().hex
    is_known = any(_ledger.parent.rglob(f"outbox/**/{task.uid}.{task.rung}.*.json"))
    _note("known" if is_known else "begun", task, token)
    time.sleep(_seconds)
    found = fake_search.evaluate(replace(task, uid=task.uid.partition(".")[0]))
    _note("returned", task, token)
    return replace(found, uid=task.uid, host=token)


def evaluate_and_note(outbox: Path, evaluate: Callable[[Task], Evaluation], task: Task) -> Evaluation:
    """Replacement for `evaluate_into` that also logs "written"."""
    found = evaluate_into(outbox, evaluate, task)
    _note("written", task, found.host)
    return found


def _note(what: str, task: Task, token: str) -> None:
    with _ledger.open("a") as file:
        file.write(f"{what} {task.uid} {task.rung} {os.getpid()} {token} {time.monotonic()}\n")


def drive(folder: Path, url: str, config: StudyConfig, seconds: float, lease: float) -> None:
    """Main function of a driver process."""
    global _seconds, _ledger
    _seconds, _ledger = seconds, folder.parent / "ledger"
    serial_workers.evaluate_into = evaluate_and_note  # type: ignore[assignment]
    run_study(config, folder, storage=url, evaluate="driving:evaluate", lease=lease)


def start(folder: Path, url: str, config: StudyConfig, seconds: float = 0.0, lease: float = 5.0) -> BaseProcess:
    process = _context.Process(target=drive, args=(folder, url, config, seconds, lease))
    process.start()
    return process


def end(*processes: BaseProcess) -> None:
    """Wait for all processes, and assert that each ended with exit code 0."""
    for process in processes:
        process.join(timeout=600)
    try:
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


def ledger(place: Path) -> list[Line]:
    """All lines of the ledger, in order."""
    if not (place / "ledger").exists():
        return []
    found = []
    for line in (place / "ledger").read_text().splitlines():
        what, uid, rung, process, token, moment = line.split()
        found.append(Line(what, uid, int(rung), int(process), token, float(moment)))
    return found


def evaluated(place: Path) -> Counter[tuple[str, str]]:
    """How often each candidate was begun at each rung: (uid, rung) -> count."""
    return Counter((line.uid, str(line.rung)) for line in ledger(place) if line.what in BEGUN)


def drivers(place: Path) -> int:
    """Number of processes in the ledger."""
    return len({line.process for line in ledger(place)})


def wait_for(place: Path, count: int) -> None:
    """Wait until `count` evaluations were begun. Raises AssertionError when none begins for two minutes."""
    before, deadline = -1, 0.0
    while (now := evaluated(place).total()) < count:
        if now > before:
            before, deadline = now, time.monotonic() + 120
        assert time.monotonic() < deadline, "the drivers do not get on"
        time.sleep(0.05)


def read(url: str) -> list[Record]:
    reader = open_study_readonly(storage=url)
    try:
        return reader.records()
    finally:
        reader.close()
