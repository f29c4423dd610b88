"""The drivers that share a study: each says now and then that it lives, and what the dead ones ran is taken over.

On the same machine the lock that a driver holds tells at once and for certain. From elsewhere a driver counts as dead
when its beat did not change for a lease, by the clock of whoever looks: clocks of different hosts are never compared.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from prunesearch.study.lock import Place, is_held
from prunesearch.study.reader import Beat
from prunesearch.study.store import Store

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
BEATS_PER_LEASE = 4


class Team:
    """This driver among the others. A thread of its own beats, also while an evaluation keeps the driver busy."""

    def __init__(self, store: Store, place: Place, lease: float | None = None) -> None:
        self.store, self.lease = store, LEASE_SECONDS if lease is None else lease
        self._place, self._machine = place, _machine()
        self._seen: dict[str, tuple[int | None, float]] = {}
        self._count = time.time_ns()  # other than any of an earlier process with this name
        self.store.beat(self._said(self._count), patiently=True)  # before the first claim, so that none is without it
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._thread.start()

    def dead(self, names: Iterable[str]) -> set[str]:
        """Which of these other drivers ended, or were silent for a lease since they were looked at first."""
        beats = self.store.beats()
        return {name for name in names if self._is_dead(name, beats.get(name))}

    def outboxes(self, name: str, folder: Path) -> list[Path]:
        """Where results of a driver may lie that the storage lacks: in its own folder, as its beat says, and in
        `folder`, this driver's, which is the same one where its path is another on this machine. Without a beat it was
        alone when it ran."""
        beat = self.store.beats().get(name)
        if beat is None:
            return [folder / "outbox"]
        its = Path(beat.place).parents[1]  # FOLDER/drivers/NUMBER
        return [place / "outbox" / name for place in dict.fromkeys((its, folder))]

    def close(self) -> None:
        """Leave: what this driver still runs can be taken over at once."""
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
            self.store.beat(self._said(count))
        except Exception as error:  # the storage is away: the next one may come through
            logger.info("no beat: %s", error)

    def _said(self, count: int | None) -> Beat:
        return Beat(count, self._machine, str(self._place.file))


def _machine() -> str:
    """What only processes of this machine, since it was started, have in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
