"""Other drivers of the same study: learn their results, and take over the candidates of dead drivers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record
from prunesearch.search.events import Event, Finished
from prunesearch.search.recovery import Recovery
from prunesearch.search.state import SearchState
from prunesearch.study.lost_database import contradiction
from prunesearch.study.store import Store
from prunesearch.study.team import Team, outboxes_of
from prunesearch.workers.outbox import discard

LOOK_SECONDS = 1.0
"""Interval at which the storage is polled for changes of other drivers."""


class Others(Protocol):
    """The other drivers, if there are any."""

    def run_something(self) -> bool:
        """True while other drivers run candidates. Their results can trigger promotions here, and their candidates must
        be taken over if they die."""

    def look(self, slots: int, at_once: bool = False) -> None:
        """Learn their results, and take over candidates of dead drivers for free workers.

        slots: workers of this driver, busy ones included. at_once: even if LOOK_SECONDS have not passed.
        """

    def leave(self, uid: str) -> None:
        """Read the present state of a candidate that another driver has taken over."""


class NoOthers:
    """For a study with one driver."""

    def run_something(self) -> bool:
        return False

    def look(self, slots: int, at_once: bool = False) -> None:
        return None

    def leave(self, uid: str) -> None:
        raise contradiction(f"candidate {uid}", "the storage says that it does not run here")


class OtherDrivers:
    """For a study that several drivers run in one database. outbox: of this driver."""

    def __init__(
        self,
        state: SearchState,
        store: Store,
        recovery: Recovery,
        team: Team,
        outbox: Path,
        on_event: Callable[[Event], None],
    ) -> None:
        self.state, self.store, self.recovery, self.team = state, store, recovery, team
        self.outbox, self.on_event = outbox, on_event
        self._looked = 0.0

    def run_something(self) -> bool:
        return bool(self.state.waiting) or any(not self.state.is_here(one.uid) for one in self.store.running())

    def look(self, slots: int, at_once: bool = False) -> None:
        if time.monotonic() - self._looked < LOOK_SECONDS and not at_once:
            return
        self._looked = time.monotonic()
        for record in self.store.poll():
            if not self.state.is_here(record.uid):
                self._learn_of(record)
        self._take_over(slots)

    def leave(self, uid: str) -> None:
        record = self.store.find(uid)
        if record is not None:
            self._learn_of(record)

    def _learn_of(self, record: Record) -> None:
        known = self.state.records.get(record.uid)
        if known is None:
            self.state.begin(record)
        self.state.records[record.uid] = record
        for evaluation in record.evaluations[0 if known is None else len(known.evaluations) :]:
            self.state.finish(record, evaluation)
            self._say_finished(record, evaluation)
            if (record.uid, evaluation.rung) in self.recovery.kept:  # the other driver has a result now
                self.recovery.kept.remove((record.uid, evaluation.rung))
                discard(self.outbox, record.uid, evaluation.rung)
        self.state.promotions.add(record)

    def _take_over(self, slots: int) -> None:
        elsewhere = [record for record in self.store.running() if not self.state.is_here(record.uid)]
        dead = self.team.dead({record.owner for record in elsewhere if not self.store.owns(record)})
        places = [place for owner in sorted(dead) for place in outboxes_of(owner, self.store, self.recovery.folder)]
        if dead and self.recovery.kept:  # may hold results of candidates that a dead driver took over
            places.append(self.outbox)
        for record in (record for place in places for record in self.recovery.adopt(place, dead)):
            assert record.evaluation is not None
            self.state.finish(record, record.evaluation)
            self._say_finished(record, record.evaluation)
        for record in elsewhere:
            if len(self.state.under_way) + len(self.state.waiting) >= slots:
                break  # leave the rest to drivers with free workers
            is_left = record.owner in dead and self.state.records[record.uid].state == "running"
            if is_left and self.store.take_over(record):
                self._run_again(replace(record, owner=self.store.owner))

    def _run_again(self, record: Record) -> None:
        self.state.records[record.uid] = record
        if record.rung_done == record.rung:  # the result is stored, but the candidate was not closed
            self.recovery.close(record)
        else:
            self.state.waiting.append(record)

    def _say_finished(self, record: Record, evaluation: Evaluation) -> None:
        self.on_event(Finished(record, evaluation, self.state.rejected))
