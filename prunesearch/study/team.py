"""Liveness of the drivers that share a study: each one beats regularly; one that stops counts as dead.

On the same machine the file lock of a driver shows whether it is alive. On other machines a driver counts as dead when
its beat has not changed for one lease, measured by the observer's clock. Clocks of different hosts are never compared.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from prunesearch.study.lock import Place, is_driver_name, is_held
from prunesearch.study.reader import Beat
from prunesearch.study.store import Store

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
BEATS_PER_LEASE = 4


def outboxes_of(name: str, store: Store, folder: Path) -> list[Path]:
    """Folders that may hold results of another driver which the storage lacks.

    These are the outbox in the folder named by its beat, and the one in `folder`, the folder of this driver: a shared
    disk may have another path on this machine. A driver without a beat was the only one when it ran. Empty when no
    driver can have this name.
    """
    if not is_driver_name(name):
        return []
    beat = store.beats().get(name)
    if beat is None:
        return [folder / "outbox"]
    its = Path(beat.place).parents[1]  # FOLDER/drivers/NUMBER
    return [place / "outbox" / name for place in dict.fromkeys((its, folder))]


class NoTeam:
    """For a study with one driver: any other driver of it has ended."""

    def dead(self, names: Iterable[str]) -> set[str]:
        return set(names)


class Team:
    """This driver among the others. A background thread beats, even while an evaluation blocks the driver."""

    def __init__(self, store: Store, place: Place, lease: float | None = None) -> None:
        self.store, self.lease = store, LEASE_SECONDS if lease is None else lease
        self._place, self._machine = place, _machine()
        self._seen: dict[str, tuple[int | None, float]] = {}
        self._count = time.time_ns()  # differs from every beat of an earlier process with this name
        self.store.beat(self._beat_with(self._count), patiently=True)  # before the first claim
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._thread.start()

    def dead(self, names: Iterable[str]) -> set[str]:
        """Those of these drivers that have ended, or whose beat has not changed for a lease of observation."""
        beats = self.store.beats()
        return {name for name in names if self._is_dead(name, beats.get(name))}

    def close(self) -> None:
        """Stop beating and mark this driver as ended, so that its candidates can be taken over at once."""
        self._over.set()
        self._thread.join()
        self._say(None)

    def _is_dead(self, name: str, beat: Beat | None) -> bool:
        if beat is not None and beat.machine == self._machine:
            lives = is_held(Path(beat.place), name)
            if lives is not None:
                return not lives
        count, now = None if beat is None else beat.count, time.monotonic()
        before, since = self._seen.get(name, (None, now))
        self._seen[name] = count, since if before == count else now
        has_left = beat is not None and beat.count is None
        return has_left or now - self._seen[name][1] >= self.lease

    def _beat(self) -> None:
        while not self._over.wait(self.lease / BEATS_PER_LEASE):
            self._count += 1
            self._say(self._count)

    def _say(self, count: int | None) -> None:
        try:
            self.store.beat(self._beat_with(count))
        except Exception as error:  # the storage is unavailable; the next beat may succeed
            logger.info("no beat: %s", error)

    def _beat_with(self, count: int | None) -> Beat:
        return Beat(count, self._machine, str(self._place.file))


def _machine() -> str:
    """An id of this machine, new with each boot; the host name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
