"""File locks of a study: they allow one driver, or several that share a database, and give each driver a name.

The kernel releases the locks when a process ends, even if it is killed.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from prunesearch.errors import StudyError


@dataclass(frozen=True)
class Place:
    """The name of a driver, and the file that it keeps locked while it lives (None if it is the only driver)."""

    name: str
    file: Path | None = None


def is_driver_name(name: str) -> bool:
    """Whether a text can be the name of a driver. Such a name is safe as the name of a folder."""
    return 0 < len(name) <= 255 and name.isprintable() and "/" not in name and name not in (".", "..")


def is_drivers_file(path: str) -> bool:
    """Whether a text can be the path of a file that a driver keeps locked: /.../drivers/NUMBER."""
    file = Path(path)
    return path.isprintable() and file.is_absolute() and file.parent.name == "drivers" and file.name.isdecimal()


@contextmanager
def only_driver(folder: Path, journal: Path | None = None) -> Iterator[Place]:
    """Lock a study folder, and the journal if any, for this driver alone. Raises StudyError when another driver has it.

    The journal has a lock of its own, because drivers with other folders may use the same journal.
    """
    name = f"{socket.gethostname()}:{os.getpid()}"
    places = {folder: folder / "lock"}
    if journal is not None:
        journal = journal.resolve()  # all paths to one journal must give one lock file
        journal.parent.mkdir(parents=True, exist_ok=True)
        places[journal] = journal.with_name(f"{journal.name}.driver")  # Optuna uses NAME.lock
    with ExitStack() as stack:
        for place, path in places.items():
            file = stack.enter_context(path.open("a+"))
            if not _lock(file, fcntl.LOCK_EX):
                raise StudyError(_taken(place, file))
            _write(file, name)
        yield Place(name)


@contextmanager
def one_of_several(folder: Path, database: Path | None) -> Iterator[Place]:
    """Lock a place as one of several drivers, and take the name of that place.

    The first free place of the folder is taken. A driver that is started again after a crash therefore gets its former
    name, and continues the candidates that ran under it.

    database: the SQLite file; None for servers. Raises StudyError when a driver that must be alone (`only_driver`) runs
    in the folder of that file.
    """
    with ExitStack() as stack:
        if database is not None:
            file = stack.enter_context((database.parent / "lock").open("a+"))
            if not _lock(file, fcntl.LOCK_SH):
                raise StudyError(_taken(database.parent, file))
        yield stack.enter_context(_place(folder))


def is_held(path: Path, name: str) -> bool | None:
    """Whether the driver with this name is alive, judged by the lock on its file.

    None when the file is missing or is another driver's. Do not call it for your own file: closing the file releases
    the lock.
    """
    try:
        with path.open("r+") as file:
            if file.read().strip() != name:
                return None
            return not _lock(file, fcntl.LOCK_EX)
    except OSError:
        return None


@contextmanager
def _place(folder: Path) -> Iterator[Place]:
    (folder / "drivers").mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        path = folder / "drivers" / str(number)
        with path.open("a+") as file:
            if _lock(file, fcntl.LOCK_EX):
                file.seek(0)
                name = file.read().strip()
                if not name:
                    name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
                    _write(file, name)
                yield Place(name, path)
                return


def _lock(file: TextIO, kind: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)  # unlike flock, not inherited by forked children
    except OSError:
        return False
    return True


def _write(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def _taken(folder: Path, file: TextIO) -> str:
    file.seek(0)
    return (
        f"{folder}: another process ({file.read().strip() or 'unknown'}) runs this study. Possible: one at a time, or "
        f"several that are all started with the same --storage URL of a database. Wait for it, stop it, or give this "
        f"search another name."
    )
