"""The worker in the driver's process: exceptions fail the candidate only, and there is one worker."""

from __future__ import annotations

from asyncio import CancelledError
from pathlib import Path

import fake_search
import pytest
from fake_search import EVALUATED, run, study

from prunesearch.config import WorkersConfig
from prunesearch.errors import ResourceError
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.search.events import Finished


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("no"), GeneratorExit(), CancelledError(), MemoryError()])
def test_what_an_evaluation_raises_costs_that_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def raise_at_times(task: Task) -> Evaluation:
        if len(EVALUATED) == 2:
            EVALUATED.append(task.uid)
            raise error
        return original(task)

    EVALUATED.clear()
    original = fake_search.evaluate
    monkeypatch.setattr(fake_search, "evaluate", raise_at_times)
    done, events = run(study(5), tmp_path)
    assert (done.complete, done.failed) == (4, 1)
    [failure] = [event.evaluation for event in events if isinstance(event, Finished) and event.evaluation.error]
    assert failure.cause == "error" and failure.error.startswith(type(error).__name__)


@pytest.mark.parametrize("changes", [{}, {"timeout": 5.0}])
def test_serial_is_one_worker(tmp_path: Path, changes: dict[str, float]) -> None:
    with pytest.raises(ResourceError, match=r"workers.count: 4, .* kind: ray"):
        run(study(workers=WorkersConfig(kind="serial", count=4, **changes)), tmp_path)
