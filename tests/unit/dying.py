"""Deaths of the driver at chosen points of its loop, by replacing what it calls there."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from prunesearch.search import loop
from prunesearch.study.store import Store

STEPS: dict[str, tuple[Any, str, bool]] = {
    "result": (loop.Search, "_handle", False),  # a worker delivered, and nothing was done about it yet
    "submitted": (Store, "finish", False),  # alone: the worker is busy again, and the result is not written
    "finished": (Store, "finish", True),
    "begun": (loop, "discard", False),  # everything is written, and the outbox still has the result
    "discarded": (loop, "discard", True),
}
"""By name: what is called there, and whether death comes after the call."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the driver handles it."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: str, time: int) -> None:
    """Die when the loop reaches a step for the time-th time."""
    place, name, after = STEPS[step]
    call, times = getattr(place, name), 0

    @functools.wraps(call)
    def dying(*arguments: Any) -> Any:
        nonlocal times
        times += 1
        if times == time and not after:
            raise Killed
        found = call(*arguments)
        if times == time:
            raise Killed
        return found

    monkeypatch.setattr(place, name, dying)
