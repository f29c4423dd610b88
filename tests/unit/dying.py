"""Kill the driver at chosen steps of its loop, by replacing a function that it calls there."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from prunesearch.search import loop
from prunesearch.search.recovery import Recovery
from prunesearch.study.store import Store

STEPS: dict[str, tuple[Any, str, bool]] = {
    "result": (loop.Search, "_handle", False),  # a result arrived and was not processed yet
    "delivered": (Store, "finish", False),  # the result is in the outbox only
    "written": (Store, "finish", True),
    "claimed": (loop, "begin", True),  # the candidate is claimed, but not submitted
    "submitted": (loop.Search, "_submit", True),
    "before discarding": (Recovery, "discard", False),  # all is written, and the result is still in the outbox
    "discarded": (Recovery, "discard", True),
}
"""Step -> (place, function called there, whether the driver dies after the call)."""


class Killed(BaseException):
    """Simulates SIGKILL: nothing in the driver handles it."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: str, time: int) -> None:
    """Raise Killed when the loop reaches a step for the `time`-th time."""
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
