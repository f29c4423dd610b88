"""The final front measured again: from scratch, with fresh seeds, on the test images when there are any.

Each evaluation is stored as it comes, so that a kill repeats nothing that is finished, and the next call goes on.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from prunesearch.config import StudyConfig
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.front import dense_of, front
from prunesearch.search.again import name_of
from prunesearch.search.outbox import delivered, discard
from prunesearch.search.propose import seed_of
from prunesearch.search.record import Record
from prunesearch.search.tasks import task_of
from prunesearch.search.verdict import failed, judged, same_work
from prunesearch.search.workers import Lost, Workers

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5


class Storage(Protocol):
    """What is needed of a study."""

    def records(self) -> list[Record]: ...
    def confirm(self, uid: str, index: int, evaluation: Evaluation) -> None: ...


@dataclass(frozen=True)
class Confirmed:
    """A candidate was evaluated with a fresh seed; so many of all such evaluations are over, failed ones included."""

    record: Record
    evaluation: Evaluation
    done: int
    total: int


@dataclass(frozen=True)
class Confirmation:
    """One evaluation with a fresh seed that is wanted."""

    record: Record
    index: int
    task: Task


def confirm(
    config: StudyConfig,
    folder: Path,
    outbox: Path,
    store: Storage,
    workers: Workers,
    on_event: Callable[[Confirmed], None] = lambda event: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Evaluate the front and the dense model again, `config.confirm.seeds` times each, as far as that is not done.

    folder: of the study. outbox: of the workers. is_stopped: asked before each evaluation; those under way are waited
    for. What fails is logged and not stored, so that the next call tries it again.
    """
    every = wanted(config, folder, store.records())
    _adopt(every, outbox, store)
    waiting = deque(missing(config, folder, store.records()))
    done, total = len(every) - len(waiting), len(every)
    under_way: dict[str, Confirmation] = {}
    deaths: Counter[str] = Counter()
    while waiting or under_way:
        while waiting and len(under_way) < workers.count and not is_stopped():
            one = waiting.popleft()
            under_way[one.task.uid] = one
            workers.submit(replace(one.task, attempt=deaths[one.task.uid]))
        if not under_way:
            return
        for task, outcome in workers.wait(TICK_SECONDS):
            one = under_way.pop(task.uid)
            if isinstance(outcome, Lost):
                deaths[task.uid] += 1
                if outcome.cause == "crash" and deaths[task.uid] <= config.workers.retries:
                    waiting.appendleft(one)
                    continue
                outcome = failed(task, outcome.cause, outcome.error)
            evaluation = judged(outcome, config)
            if evaluation.status == "complete":
                store.confirm(one.record.uid, one.index, evaluation)
            else:
                logger.warning("%s: not confirmed (%s): %s", task.uid, evaluation.cause, evaluation.error)
            discard(outbox, task.uid, task.rung)
            done += 1
            on_event(Confirmed(one.record, evaluation, done, total))


def missing(config: StudyConfig, folder: Path, records: Iterable[Record]) -> list[Confirmation]:
    """Evaluations with fresh seeds that are wanted and not there."""
    every = wanted(config, folder, list(records))
    return [one for one in every if all(known.uid != one.task.uid for known in one.record.confirmations)]


def wanted(config: StudyConfig, folder: Path, records: list[Record]) -> list[Confirmation]:
    """One of each candidate before the second of any; the dense model first, then along the front."""
    chosen = front(records, config.objectives, config.limits)
    dense = dense_of(records)
    if all(record is dense for record in chosen):
        return []
    if dense is not None:
        chosen = [dense, *(record for record in chosen if record is not dense)]
    return [
        Confirmation(record, index, _task(record, index, config, folder))
        for index in range(config.confirm.seeds)
        for record in chosen
    ]


def _task(record: Record, index: int, config: StudyConfig, folder: Path) -> Task:
    split: Literal["validation", "test"] = "test" if config.data.has_test else "validation"
    return replace(
        task_of(replace(record, rung=record.rung_done), 0, config, folder),
        uid=name_of(record.uid, split, index),
        seed=seed_of(config.sampler.seed, record.uid, "confirm", index),
        split=split,
        resume_from=None,
        save_to=None,
    )


def _adopt(every: Iterable[Confirmation], outbox: Path, store: Storage) -> None:
    """Store what workers of an earlier process finished and nobody took."""
    expected = {one.task.uid: one for one in every}
    for path, task, evaluation in delivered(outbox):
        one = expected.get(task.uid)
        if one is not None and same_work(task, one.task) and evaluation.status == "complete":
            store.confirm(one.record.uid, one.index, evaluation)
            path.unlink(missing_ok=True)
