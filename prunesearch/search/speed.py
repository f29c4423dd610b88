"""Speed as it is measured at the end: the front and the start schedules, timed in turns with the dense model.

It is one task, which `once.py` has one driver make, on a worker of its own while its other workers are closed. Its
result is stored as confirmation 0 of `record.SPEED`. Another front, or other conditions, make another task.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

from prunesearch.config import Budget, StudyConfig
from prunesearch.evaluate.task import Evaluation, Task, ToTime, timing_work
from prunesearch.record import SPEED, Record
from prunesearch.relative_limits import front_within
from prunesearch.schedule import Schedule
from prunesearch.search.once import Crew, make_each_once
from prunesearch.strict import to_mapping
from prunesearch.study.store import Store
from prunesearch.workers.outbox import delete, delivered

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timed:
    """Event: the front and the start schedules were timed, or that failed."""

    evaluation: Evaluation


@dataclass(frozen=True)
class Wanted:
    """The one task that times all schedules of a study."""

    task: Task
    of: str = SPEED
    index: int = 0


def time_schedules(config: StudyConfig, crew: Crew, on_event: Callable[[Timed], None] = lambda event: None) -> None:
    """Time the schedules if that is not stored yet.

    A failure is a warning; the next call tries again. Drivers with different settings time once each.
    """
    made: set[str] = set()

    def look() -> tuple[Sequence[Wanted], Sequence[Wanted]]:
        every = wanted(config, crew.folder, crew.store.records())
        return every, [one for one in every if one.task.uid not in {*made, *crew.store.confirmed(SPEED)}]

    def say(one: Wanted, evaluation: Evaluation, done: int, total: int) -> None:
        made.add(one.task.uid)
        if evaluation.status == "failed":
            logger.warning("speed: not measured (%s): %s", evaluation.cause, evaluation.error)
        on_event(Timed(evaluation))

    make_each_once(crew, look, partial(_adopt, config, crew.folder, crew.store), say, waits=True)


def take_up_speeds(config: StudyConfig, folder: Path, outboxes: Iterable[Path], store: Store) -> None:
    """At the start of a run: store what earlier runs left in outboxes."""
    for outbox in outboxes:
        _adopt(config, folder, store, outbox)


def wanted(config: StudyConfig, folder: Path, records: list[Record]) -> list[Wanted]:
    """The task that times the front, the dense model and the start schedules of a study.

    Empty when they are not to be timed, or when there is nothing but the dense model.
    """
    if config.confirm.speed_seconds == 0:
        return []
    chosen = {record.uid for record in front_within(config, records)}
    rows = [record for record in records if record.uid in chosen or (record.is_start and record.rung_done >= 0)]
    rows = [record for record in rows if record.schedule.stages and record.state != "failed"]
    if not rows:
        return []
    profile = config.target.profile
    work = timing_work(
        tuple(_to_time(record, folder) for record in rows), config.confirm.speed_seconds, config.measure, profile
    )
    threads = max(1, int(config.workers.cpus_each)) if profile is None else profile.threads or None
    task = Task(
        uid="",
        model=config.model,
        data=config.data,
        schedule=Schedule(),
        budget=Budget(images=0),
        finetune=config.finetune,
        measure=config.measure,
        device=config.workers.device,
        threads=threads,
        plugins=config.plugins,
        profile=profile,
        timing=work,
    )
    return [Wanted(replace(task, uid=_uid(task)))]


def _to_time(record: Record, folder: Path) -> ToTime:
    """A record as the worker times it; with thresholds from the weights with which it was measured."""
    evaluation = record.evaluation
    if evaluation is None or not record.outcome.is_adaptive:
        return ToTime(record.uid, record.outcome)
    weights = None
    if evaluation.images > 0:
        stem = evaluation.checkpoint or str(folder / "weights" / f"{record.uid}.{record.rung_done}")
        weights = f"{stem}.safetensors"
    return ToTime(record.uid, record.outcome, weights, evaluation.start)


def _uid(task: Task) -> str:
    """Identity of the result: a hash of what is timed and how. Where weights and images lie does not matter."""
    work = task.timing
    assert work is not None
    what = [[one.name, to_mapping(one.schedule)] for one in work.schedules]
    how = [work.seconds, work.batch, work.runtime, work.precision, task.device, task.threads, task.finetune.amp]
    text = json.dumps([to_mapping(task.model), what, how], sort_keys=True)
    return f"{SPEED}-{blake2b(text.encode(), digest_size=6).hexdigest()}"


def _adopt(config: StudyConfig, folder: Path, store: Store, outbox: Path) -> None:
    """Store speeds left in an outbox by an earlier process or a dead driver, if they are still wanted."""
    found = [entry for entry in delivered(outbox, store.alone, folder) if entry[1].timing is not None]
    uids = {one.task.uid for one in wanted(config, folder, store.records())} if found else set()
    for path, task, evaluation in found:
        if task.uid in uids and evaluation.uid == task.uid and evaluation.status == "complete":
            store.confirm(SPEED, 0, evaluation)
        delete(path)
