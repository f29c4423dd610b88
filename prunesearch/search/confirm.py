"""Confirmation: train and evaluate the final front again from scratch, with fresh seeds, on the test images if any.

The evaluations are made as `once.py` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prunesearch.config import StudyConfig
from prunesearch.confirmation import name_of
from prunesearch.evaluate.outcome import check_evaluation, same_work
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.front import dense_of
from prunesearch.record import Record
from prunesearch.relative_limits import front_within
from prunesearch.samplers.propose import seed_of
from prunesearch.search.once import Crew, make_each_once, release_claims
from prunesearch.search.tasks import task_of
from prunesearch.study.store import Store
from prunesearch.workers.outbox import delete, delivered

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Confirmed:
    """Event: a candidate was evaluated with a fresh seed. done, total: such evaluations, failed ones included."""

    record: Record
    evaluation: Evaluation
    done: int
    total: int


@dataclass(frozen=True)
class Wanted:
    """An evaluation with a fresh seed that the study should have: the index-th one of a candidate."""

    record: Record
    index: int
    task: Task

    @property
    def of(self) -> str:
        """The uid of the candidate."""
        return self.record.uid


def confirm(config: StudyConfig, crew: Crew, on_event: Callable[[Confirmed], None] = lambda event: None) -> None:
    """Evaluate the front and the dense model `config.confirm.seeds` times each; skip what is already stored.

    Failed evaluations are logged and not stored; the next call tries them again.

    Each driver claims an evaluation before it starts it. This one waits for the evaluations of the others, and takes
    over those of dead drivers.
    """

    def look() -> tuple[list[Wanted], list[Wanted]]:
        records = crew.store.records()
        return wanted(config, crew.folder, records), missing(config, crew.folder, records)

    def say(one: Wanted, evaluation: Evaluation, done: int, total: int) -> None:
        if evaluation.status == "failed":
            logger.warning("%s: not confirmed (%s): %s", one.task.uid, evaluation.cause, evaluation.error)
        on_event(Confirmed(one.record, evaluation, done, total))

    make_each_once(crew, look, lambda place: _adopt(config, crew.folder, place, crew.store), say, waits=True)


def take_up_confirmations(config: StudyConfig, folder: Path, outboxes: Iterable[Path], store: Store) -> None:
    """After a restart: store what earlier runs left in outboxes, and release other claims of this driver's name."""
    for outbox in outboxes:
        _adopt(config, folder, outbox, store)
    release_claims(store)


def missing(config: StudyConfig, folder: Path, records: Iterable[Record]) -> list[Wanted]:
    """The `wanted` evaluations that the study does not have yet."""
    every = wanted(config, folder, list(records))
    return [one for one in every if all(known.uid != one.task.uid for known in one.record.confirmations)]


def wanted(config: StudyConfig, folder: Path, records: list[Record]) -> list[Wanted]:
    """All evaluations with fresh seeds, in the order to run them: the first of every candidate, then the second, ...

    The dense model comes first, then the front. Empty when the front has no other candidate than the dense model.
    """
    chosen = front_within(config, records)
    dense = dense_of(records)
    if all(record is dense for record in chosen):
        return []
    if dense is not None:
        chosen = [dense, *(record for record in chosen if record is not dense)]
    return [
        Wanted(record, index, _task(record, index, config, folder))
        for index in range(config.confirm.seeds)
        for record in chosen
    ]


def _task(record: Record, index: int, config: StudyConfig, folder: Path) -> Task:
    split: Literal["validation", "test"] = "test" if config.data.has_test else "validation"
    return replace(
        task_of(replace(record, rung=record.rung_done), 0, config, folder),
        uid=name_of(record.uid, split, index),
        confirms=record.uid,
        seed=seed_of(config.sampler.seed, record.uid, "confirm", index),
        split=split,
        resume_from=None,
        save_to=None,
    )


def _adopt(config: StudyConfig, folder: Path, outbox: Path, store: Store) -> None:
    """Store the confirmations left in an outbox by an earlier process or a dead driver."""
    found = [entry for entry in delivered(outbox, store.alone, folder) if entry[1].confirms is not None]
    records = {record.uid: record for record in store.records()} if found else {}
    for path, task, evaluation in found:
        record = records.get(task.confirms or "")
        if record is None or record.rung_done < 0 or evaluation.uid != task.uid:
            continue
        for index in range(config.confirm.seeds):
            if same_work(task, _task(record, index, config, folder)):
                evaluation = check_evaluation(evaluation, config.deciding_metrics)
                if evaluation.status == "complete":
                    store.confirm(record.uid, index, evaluation)
                delete(path)
                break
