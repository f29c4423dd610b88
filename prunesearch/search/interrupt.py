"""Ctrl-C and SIGTERM: the first signal asks the search to stop, the second raises KeyboardInterrupt."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Count signals from `listen` to the end of the `with` block, which restores the previous handlers.

    Python delivers signals to the main thread only; in other threads this does nothing.
    """

    def __init__(self) -> None:
        self.count, self.name = 0, ""

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        return self

    def listen(self) -> None:
        """Begin to count. Call it after libraries that install signal handlers (Ray) have started."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = signal.Signals(number).name
        if self.count > 1:
            raise KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
