"""Evaluations beside the search, each made once by one of the drivers.

Each one is stored as soon as it is finished. After a kill, the next call continues with the missing ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from prunesearch.evaluate.outcome import check_evaluation, failed
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.study.lost_database import contradiction
from prunesearch.study.reader import Claim
from prunesearch.study.store import Store
from prunesearch.study.team import NoTeam, Team, outboxes_of
from prunesearch.workers.outbox import discard
from prunesearch.workers.protocol import Lost, Workers

TICK_SECONDS = 0.5


class Once(Protocol):
    """An evaluation to make once, by its task. It is stored as confirmation `index` of the uid `of`."""

    @property
    def of(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def task(self) -> Task: ...


One = TypeVar("One", bound=Once)


@dataclass(frozen=True)
class Crew:
    """Who makes evaluations beside the search.

    folder: of the study. outbox: of the workers. team: other drivers of the study. is_stopped: when it returns True, no
    further evaluation starts, and the running ones are waited for.
    """

    folder: Path
    outbox: Path
    store: Store
    workers: Workers
    team: Team | NoTeam
    is_stopped: Callable[[], bool] = lambda: False


def make_each_once(
    crew: Crew,
    look: Callable[[], tuple[Sequence[One], Sequence[One]]],
    adopt: Callable[[Path], None],
    say: Callable[[One, Evaluation, int, int], None],
    *,
    waits: bool,
) -> None:
    """Make the evaluations that are missing. Each driver claims one before it starts it.

    Failed evaluations are not stored; the next call tries them again. Those of dead drivers are taken over.

    look: returns all evaluations that the study should have, and those of them that are missing. adopt: stores the
    results in an outbox. say: called with each evaluation that was made, how many there are by now (failed ones
    included), and how many there should be. waits: also wait for what other living drivers have claimed.
    """
    store, workers, is_stopped = crew.store, crew.workers, crew.is_stopped
    adopt(crew.outbox)
    failed_before = {(name, claim) for name, claim in store.claims().items() if claim.failed}
    failed_now: set[str] = set()
    under_way: dict[str, One] = {}
    deaths: Counter[str] = Counter()
    while True:
        claims = store.claims()
        failed_now |= {name for name, claim in claims.items() if claim.failed and (name, claim) not in failed_before}
        dead = _adopt_from_dead(claims, adopt, crew)
        every, missing = look()
        left = [one for one in missing if one.task.uid not in failed_now]
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
                raise contradiction(f"evaluation {left[0].task.uid}", "the storage says that another driver has it")
            if not waits:
                return
            time.sleep(TICK_SECONDS)  # other drivers run what is left
            continue
        done = len(every) - len(left)
        for task, outcome in workers.wait(TICK_SECONDS):
            one = under_way.pop(task.uid)
            if isinstance(outcome, Lost):
                deaths[task.uid] += 1
                if outcome.cause == "crash" and deaths[task.uid] <= store.config.workers.retries:
                    continue  # still missing and still claimed, so the next iteration submits it again
                outcome = failed(task, outcome.cause, outcome.error)
            evaluation = check_evaluation(
                outcome, [name for name in store.config.deciding_metrics if name in task.metrics]
            )
            if evaluation.status == "complete":
                store.confirm(one.of, one.index, evaluation)
            else:
                failed_now.add(task.uid)
                store.give_up(task.uid, failed=True)
            discard(crew.outbox, task.uid, task.rung)
            done += 1
            say(one, evaluation, done, len(every))


def release_claims(store: Store) -> None:
    """After a restart: release the claims of this driver's name."""
    for name, claim in store.claims().items():
        if claim == Claim(store.owner):
            store.give_up(name, failed=False)


def _adopt_from_dead(claims: Mapping[str, Claim], adopt: Callable[[Path], None], crew: Crew) -> set[str]:
    """Store what dead drivers finished; returns the names of these drivers."""
    others = {claim.owner for claim in claims.values() if not claim.failed and claim.owner != crew.store.owner}
    dead = crew.team.dead(others) if others else set()
    for owner in sorted(dead):
        for place in outboxes_of(owner, crew.store, crew.folder):
            adopt(place)
    return dead


def _claim(one: Once, before: Claim | None, dead: Container[str], store: Store) -> bool:
    """Claim an evaluation for this driver. False when another living driver has claimed it."""
    if before is not None and not before.failed and before.owner != store.owner and before.owner not in dead:
        return False
    return store.claim(one.of, one.index, one.task.uid, before)
