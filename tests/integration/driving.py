"""One of several drivers, as a process: a fake study whose evaluations are written to a ledger."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.search.driver import run_study
from prunesearch.search.record import Record
from prunesearch.search.study import open_study_readonly

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import fake_search

_context = get_context("forkserver")
_context.set_forkserver_preload(["prunesearch.search.driver", "prunesearch.search.study"])  # imports take seconds
_seconds = 0.0
_ledger = Path()


def evaluate(task: Task) -> Evaluation:
    """Note who does what, take a while."""
    with _ledger.open("a") as file:
        file.write(f"{task.uid} {task.rung} {os.getpid()}\n")
    time.sleep(_seconds)
    return fake_search.evaluate(task)


def drive(folder: Path, url: str, config: StudyConfig, seconds: float, lease: float) -> None:
    """The process of a driver."""
    global _seconds, _ledger
    _seconds, _ledger = seconds, folder.parent / "ledger"
    run_study(config, folder, storage=url, evaluate="driving:evaluate", lease=lease)


def start(folder: Path, url: str, config: StudyConfig, seconds: float = 0.0, lease: float = 5.0) -> BaseProcess:
    process = _context.Process(target=drive, args=(folder, url, config, seconds, lease))
    process.start()
    return process


def end(*processes: BaseProcess) -> None:
    """Wait until all are done, well."""
    for process in processes:
        process.join(timeout=200)
    try:
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


def evaluated(place: Path) -> Counter[tuple[str, str]]:
    """How often each candidate was begun at each rung."""
    lines = (place / "ledger").read_text().splitlines() if (place / "ledger").exists() else []
    return Counter((line.split()[0], line.split()[1]) for line in lines)


def drivers(place: Path) -> int:
    """How many processes took part."""
    return len({line.split()[2] for line in (place / "ledger").read_text().splitlines()})


def wait_for(place: Path, count: int) -> None:
    """Until so many evaluations were begun."""
    deadline = time.monotonic() + 120
    while evaluated(place).total() < count:
        assert time.monotonic() < deadline, "the drivers do not get on"
        time.sleep(0.05)


def read(url: str) -> list[Record]:
    reader = open_study_readonly(storage=url)
    try:
        return reader.records()
    finally:
        reader.close()
