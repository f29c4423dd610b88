"""Deaths of the driver at chosen points of its loop, by replacing what it calls there."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from prunesearch.search import loop
from prunesearch.search.recovery import Recovery
from prunesearch.study.store import Store

STEPS: dict[str, tuple[Any, str, bool]] = {
    "result": (loop.Search, "_handle", False),  # a worker delivered, and nothing was done about it yet
    "delivered": (Store, "finish", False),  # the result is in the outbox only
    "written": (Store, "finish", True),
    "claimed": (loop, "begin", True),  # a candidate runs in the storage, and no worker has it
    "submitted": (loop.Search, "_submit", True),
    "before discarding": (Recovery, "discard", False),  # everything is written, and the outbox still has the result
    "discarded": (Recovery, "discard", True),
}
"""By name: what is called there, and whether death comes after the call."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the driver handles it."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: str, time: int) -> None:
    """Die when the loop reaches a step for the time-th time."""
    place, name, after = STEPS[step]
    call, times = getattr(place, name), 0

    @functools.wraps(call)
    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal times
        times += 1
        if times == time and not after:
            raise Killed
        found = call(*arguments, **named)
        if times == time:
            raise Killed
        return found

    monkeypatch.setattr(place, name, dying)
