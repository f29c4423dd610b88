"""Confirmation: train and evaluate the final front again from scratch, with fresh seeds, on the test images if any.

Each evaluation is stored as soon as it is finished. After a kill the next call continues with the missing ones.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prunesearch.config import StudyConfig
from prunesearch.confirmation import name_of
from prunesearch.evaluate.outcome import check_evaluation, failed, same_work
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.front import dense_of, front, highest_rung
from prunesearch.record import Record
from prunesearch.relative_limits import dense_record, limits_at
from prunesearch.samplers.propose import seed_of
from prunesearch.search.tasks import task_of
from prunesearch.study.lost_database import contradiction
from prunesearch.study.reader import Claim
from prunesearch.study.store import Store
from prunesearch.study.team import NoTeam, Team, outboxes_of
from prunesearch.workers.outbox import delete, delivered, discard
from prunesearch.workers.protocol import Lost, Workers

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5


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


def confirm(
    config: StudyConfig,
    folder: Path,
    outbox: Path,
    store: Store,
    workers: Workers,
    team: Team | NoTeam,
    on_event: Callable[[Confirmed], None] = lambda event: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Evaluate the front and the dense model `config.confirm.seeds` times each; skip what is already stored.

    Failed evaluations are logged and not stored; the next call tries them again.

    folder: of the study. outbox: of the workers. team: other drivers of the study. Each driver claims an evaluation
    before it starts it. This one waits for the evaluations of the others, and takes over those of dead drivers.
    is_stopped: when it returns True, no further evaluation starts, and the running ones are waited for.
    """
    _adopt(config, folder, outbox, store)
    failed_before = {(name, claim) for name, claim in store.claims().items() if claim.failed}
    failed_now: set[str] = set()
    under_way: dict[str, Wanted] = {}
    deaths: Counter[str] = Counter()
    while True:
        claims = store.claims()
        failed_now |= {name for name, claim in claims.items() if claim.failed and (name, claim) not in failed_before}
        dead = _adopt_from_dead(claims, team, config, folder, store)
        records = store.records()
        every = wanted(config, folder, records)
        left = [one for one in missing(config, folder, records) if one.task.uid not in failed_now]
        for one in left:
            name = one.task.uid
            if len(under_way) == workers.count or is_stopped():
                break
            if name not in under_way and _claim(one, claims.get(name), dead, store):
                under_way[name] = one
                workers.submit(replace(one.task, attempt=deaths[name]))
        if not under_way:
            if not left or is_stopped() or not workers.count:
                return
            if store.alone:
                raise contradiction(f"confirmation {left[0].task.uid}", "the storage says that another driver has it")
            time.sleep(TICK_SECONDS)  # other drivers run what is left
            continue
        done = len(every) - len(left)
        for task, outcome in workers.wait(TICK_SECONDS):
            one = under_way.pop(task.uid)
            if isinstance(outcome, Lost):
                deaths[task.uid] += 1
                if outcome.cause == "crash" and deaths[task.uid] <= config.workers.retries:
                    continue  # still missing and still claimed, so the next iteration submits it again
                outcome = failed(task, outcome.cause, outcome.error)
            evaluation = check_evaluation(outcome, config.deciding_metrics)
            if evaluation.status == "complete":
                store.confirm(one.record.uid, one.index, evaluation)
            else:
                logger.warning("%s: not confirmed (%s): %s", task.uid, evaluation.cause, evaluation.error)
                failed_now.add(task.uid)
                store.give_up(task.uid, failed=True)
            discard(outbox, task.uid, task.rung)
            done += 1
            on_event(Confirmed(one.record, evaluation, done, len(every)))


def take_up_confirmations(config: StudyConfig, folder: Path, outboxes: Iterable[Path], store: Store) -> None:
    """After a restart: store what earlier runs left in outboxes, and release other claims of this driver's name."""
    for outbox in outboxes:
        _adopt(config, folder, outbox, store)
    for name, claim in store.claims().items():
        if claim == Claim(store.owner):
            store.give_up(name, failed=False)


def missing(config: StudyConfig, folder: Path, records: Iterable[Record]) -> list[Wanted]:
    """The `wanted` evaluations that the study does not have yet."""
    every = wanted(config, folder, list(records))
    return [one for one in every if all(known.uid != one.task.uid for known in one.record.confirmations)]


def wanted(config: StudyConfig, folder: Path, records: list[Record]) -> list[Wanted]:
    """All evaluations with fresh seeds, in the order to run them: the first of every candidate, then the second, ...

    The dense model comes first, then the front. Empty when the front has no other candidate than the dense model.
    """
    limits = limits_at(config, dense_record(records), highest_rung(records))
    chosen = front(records, config.objectives, limits)
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


def _adopt_from_dead(
    claims: Mapping[str, Claim], team: Team | NoTeam, config: StudyConfig, folder: Path, store: Store
) -> set[str]:
    """Store the confirmations that dead drivers finished; returns the names of these drivers."""
    others = {claim.owner for claim in claims.values() if not claim.failed and claim.owner != store.owner}
    dead = team.dead(others) if others else set()
    for owner in sorted(dead):
        for place in outboxes_of(owner, store, folder):
            _adopt(config, folder, place, store)
    return dead


def _claim(one: Wanted, before: Claim | None, dead: Container[str], store: Store) -> bool:
    """Claim an evaluation for this driver. False when another living driver has claimed it."""
    if before is not None and not before.failed and before.owner != store.owner and before.owner not in dead:
        return False
    return store.claim(one.record.uid, one.index, one.task.uid, before)


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
