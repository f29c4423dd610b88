"""Detect a database that was removed or replaced, so that a study never starts over silently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prunesearch.errors import FileError, RunError, StudyError
from prunesearch.files import load_study


def contradiction(where: str, found: str) -> RunError:
    """The error for a database that lacks what this search wrote to it."""
    return RunError(
        f"{where}: {found}. Possible: the database that the search began with, as the search left it. What finished "
        f"since stays in the outbox. Put that database back, or its newest copy, and run the study again to continue; "
        f"or move the study folder away to start over."
    )


class DatabaseFile:
    """Remembers the identity of a storage file; `check` verifies later that the path still leads to it.

    only_grows: True for a journal. An SQLite file may shrink, but never to 0 bytes.
    """

    def __init__(self, path: Path, only_grows: bool) -> None:
        self.path = path.absolute()
        self._only_grows = only_grows
        self._watched = [self.path, self.path.with_name(f"{self.path.name}-wal")]  # holds SQLite's newest changes
        self._identities = {path: identity for path in self._watched if (identity := _identity(path)) is not None}
        self._size = self.path.stat().st_size

    def check(self) -> None:
        """Raise RunError when the file was removed, replaced or truncated."""
        for path, before in self._identities.items():
            now = _identity(path)
            if now is None:
                raise contradiction(str(path), "the file was removed while the search used it")
            if now != before:
                raise contradiction(str(path), "the file was replaced by another one while the search used it")
        size = self.path.stat().st_size
        if size < (self._size if self._only_grows else 1):
            raise contradiction(str(self.path), f"the file was cut off to {size} bytes while the search used it")
        self._size = size


def refuse_lost_database(name: str, folder: Path, storage: str, knows_study: Callable[[], bool]) -> None:
    """Raise StudyError when a folder has weights of this study but its storage does not have the study.

    storage: name of the storage for the message. knows_study: asks the storage.
    """
    weights = [path for path in (folder / "weights").glob("*") if not path.name.startswith(".")]
    if not weights or _name_in(folder / "study.yaml") != name or knows_study():
        return
    raise StudyError(
        f"{folder}: here are study.yaml and {len(weights)} files in weights/ of study {name!r}, but the storage "
        f"{storage} has no such study. Possible: to continue with the database of these files, or to begin anew "
        f"elsewhere. Put the database back, move the folder away, or give the study another name; then run it again."
    )


def _name_in(path: Path) -> str | None:
    """The name in a study file; None when the file is missing or cannot be read."""
    try:
        return load_study(path, read_profile=False).name
    except FileError:
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
