"""The outbox: a folder of result files, which protects finished evaluations until the storage has them.

A worker writes `UID.RUNG.ATTEMPT.json` with task and evaluation before it returns. The driver deletes the file when the
storage has the result. Files that are left are adopted when the search continues, or by another driver if this one has
died. Several processes may read an outbox at once, so any file may vanish at any moment.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import write_atomically
from prunesearch.strict import from_mapping, to_mapping

logger = logging.getLogger(__name__)

MOST_BYTES = 16 * 2**20
"""Larger files are not read. A real entry has tens of kilobytes, a few hundred with a long traceback."""


def evaluate_into(outbox: Path, evaluate: Callable[[Task], Evaluation], task: Task) -> Evaluation:
    """Evaluate a task and write the result to the outbox. If writing fails, log a warning and return it anyway."""
    evaluation = evaluate(task)
    entry = {"task": to_mapping(task), "evaluation": to_mapping(evaluation)}
    try:
        write_atomically(outbox / f"{task.uid}.{task.rung}.{task.attempt}.json", json.dumps(entry).encode())
    except OSError as error:
        logger.warning("outbox: %s is not written (%s); only the driver has this result", task.uid, error)
    return evaluation


def delivered(outbox: Path, deep: bool = False, home: Path | None = None) -> list[tuple[Path, Task, Evaluation]]:
    """The results in an outbox as (file, task, evaluation), oldest first. deep: also those in its subfolders.

    Files that cannot be read are set aside; their candidates run again. home: see `set_aside`. The subfolders of an
    outbox outside it are not read.
    """
    found, deep = [], deep and _is_in(home, outbox)
    for path in (path for _, path in sorted(_entries(outbox, deep), key=lambda entry: (entry[0], entry[1].name))):
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):
                raise ValueError("it is no file")
            if about.st_size > MOST_BYTES:
                raise ValueError(f"it has {about.st_size} bytes, and no result is that large")
            entry = json.loads(path.read_text(encoding="utf-8"))
            task = from_mapping(Task, entry["task"], str(path))
            found.append((path, task, from_mapping(Evaluation, entry["evaluation"], str(path))))
        except Exception as error:  # a bad file must not stop a search
            set_aside(path, f"it is damaged ({type(error).__name__}: {error})", home)
    return found


def set_aside(path: Path, why: str, home: Path | None = None) -> None:
    """Rename a file so that it is no result any more, without deleting it.

    Does nothing when the file is gone. Logs a warning when it cannot be renamed. home: the folder of the study. A file
    outside it is left as it is: only a database says that results may be there, and it may be a stranger's.
    """
    if not _is_in(home, path):
        logger.info("outbox: %s was not adopted, because %s", path, why)
        return
    names = (path.with_suffix(f".aside{number or ''}") for number in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("outbox: %s was not adopted, because %s; it stays there (%s)", path, why, error)
        return
    logger.warning("outbox: %s was not adopted and is now %s, because %s", path, aside.name, why)


def _is_in(home: Path | None, path: Path) -> bool:
    return home is None or path.is_relative_to(home)


def discard(outbox: Path, uid: str, rung: int) -> None:
    """Delete the files of a result, of all attempts. Call it when the storage has the result."""
    for path in outbox.glob(f"{uid}.{rung}.*.json"):
        delete(path)


def delete(path: Path) -> None:
    """Delete a file if it still exists. Logs a warning when it cannot be deleted; it is then read again next time."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("outbox: %s is in the study, but cannot be deleted (%s)", path, error)


def _entries(outbox: Path, deep: bool) -> Iterator[tuple[int, Path]]:
    """(modification time in ns, path) of everything named like a result.

    Unlike `Path.rglob`, this tolerates folders that cannot be listed and files that vanish.
    """
    try:
        names = sorted(os.listdir(outbox))
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("outbox: %s cannot be read (%s), so nothing in it is adopted", outbox, error)
        return
    for name in names:
        path = outbox / name
        if name.endswith(".json") and not name.startswith("."):
            try:
                yield path.lstat().st_mtime_ns, path
            except FileNotFoundError:  # another process has adopted it
                continue
        elif deep and path.is_dir() and not path.is_symlink():
            yield from _entries(path, deep)
