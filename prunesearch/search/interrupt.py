"""Ctrl-C and SIGTERM: the first asks to stop, the second raises KeyboardInterrupt."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Counts signals between `listen` and the end of the `with` block, which gives the old handlers back.

    Only the main thread gets signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.count, self.name = 0, ""

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        return self

    def listen(self) -> None:
        """Begin to count. Not before everything that sets handlers of its own was started."""
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
