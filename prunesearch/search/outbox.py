"""The outbox: a finished evaluation is a file before it is a row, so that a kill in between loses nothing.

A worker writes `UID.RUNG.ATTEMPT.json` with task and evaluation before it returns; the driver deletes it after the
storage has the result. What is left over is adopted when the search continues.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from prunesearch.errors import FileError
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import write_atomically
from prunesearch.strict import from_mapping, to_mapping

logger = logging.getLogger(__name__)


def evaluate_into(outbox: Path, evaluate: Callable[[Task], Evaluation], task: Task) -> Evaluation:
    """Evaluate, and write the result to the outbox before returning it. On a full disk it is returned all the same."""
    evaluation = evaluate(task)
    entry = {"task": to_mapping(task), "evaluation": to_mapping(evaluation)}
    try:
        write_atomically(outbox / f"{task.uid}.{task.rung}.{task.attempt}.json", json.dumps(entry).encode())
    except OSError as error:
        logger.warning("outbox: %s is not written (%s); only the driver has this result", task.uid, error)
    return evaluation


def delivered(outbox: Path, deep: bool = False) -> list[tuple[Path, Task, Evaluation]]:
    """Everything in the outbox, oldest first; deep: with its folders. A file that cannot be read is set aside; its
    candidate will run again."""
    found = []
    files = (outbox.rglob if deep else outbox.glob)("[!.]*.json")
    for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name)):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            task = from_mapping(Task, entry["task"], str(path))
            found.append((path, task, from_mapping(Evaluation, entry["evaluation"], str(path))))
        except (ValueError, KeyError, TypeError, FileError) as error:
            set_aside(path, f"it is damaged ({error})")
    return found


def set_aside(path: Path, why: str) -> None:
    """Take a file out of the outbox without deleting it."""
    aside = path.with_suffix(".aside")
    path.replace(aside)
    logger.warning("outbox: %s was not adopted and is now %s, because %s", path.name, aside.name, why)


def discard(outbox: Path, uid: str, rung: int) -> None:
    """Delete the files of a result that the storage has, whichever attempt it was."""
    for path in outbox.glob(f"{uid}.{rung}.*.json"):
        path.unlink(missing_ok=True)
