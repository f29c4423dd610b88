"""One driver at a time for each study folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunesearch.errors import StudyError


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The kernel releases it when this process ends, however it ends."""
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by forked children
        except OSError:
            file.seek(0)
            raise StudyError(
                f"{folder}: another process ({file.read().strip() or 'unknown'}) runs this study. Possible: one at a "
                f"time. Wait for it, stop it, or give this search another name."
            ) from None
        file.truncate(0)
        file.write(f"{socket.gethostname()}:{os.getpid()}")
        file.flush()
        yield
