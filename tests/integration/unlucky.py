"""Evaluations that end, leave or block the process that runs them, by the number of stages of their candidate."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import fake_search

from prunesearch.evaluate.task import Evaluation, Task


def evaluate(task: Task) -> Evaluation:
    """Only the candidates with one stage or none are well."""
    count = len(task.schedule.stages)
    if count == 2:
        os._exit(3)
    if count == 3:
        sys.exit("leaving")
    if count == 4:
        time.sleep(1000)
    return fake_search.evaluate(task)


def never_end(task: Task) -> Evaluation:
    """Start a process, note both, and sleep."""
    other = subprocess.Popen(["sleep", "1000"])
    Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {other.pid}")
    time.sleep(1000)
    raise AssertionError("somebody ends it before")
