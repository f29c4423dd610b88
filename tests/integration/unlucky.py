"""Evaluations that exit, crash or block their process, depending on the number of stages of the candidate."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import fake_search

from prunesearch.evaluate.task import Evaluation, Task


def evaluate(task: Task) -> Evaluation:
    """Succeeds only for candidates with at most one stage."""
    count = len(task.schedule.stages)
    if count == 2:
        os._exit(3)
    if count == 3:
        sys.exit("leaving")
    if count == 4:
        time.sleep(1000)
    return fake_search.evaluate(task)


def never_end(task: Task) -> Evaluation:
    """Start a child process, write both process ids to a file, and sleep."""
    other = subprocess.Popen(["sleep", "1000"])
    Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {other.pid}")
    time.sleep(1000)
    raise AssertionError("somebody ends it before")
