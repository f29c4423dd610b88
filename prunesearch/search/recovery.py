"""Recovery after a kill: store the results left in an outbox, and close candidates that have all their results."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path

from prunesearch.evaluate.limits import computed_excess, computed_limits
from prunesearch.evaluate.outcome import check_evaluation, same_work
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.record import Record
from prunesearch.search.state import SearchState
from prunesearch.search.tasks import task_of
from prunesearch.study.lost_database import contradiction
from prunesearch.study.store import Store
from prunesearch.workers.outbox import delete, delivered, discard, set_aside


class Recovery:
    """Moves results from outboxes to the storage.

    folder: of the study. left: outboxes in which earlier runs may have left results. kept: (uid, rung) of results that
    stay in an outbox, because another driver has taken the candidate over. They are adopted if that driver dies.
    """

    def __init__(self, state: SearchState, store: Store, folder: Path, left: Iterable[Path] = ()) -> None:
        self.state, self.store, self.folder, self.left = state, store, folder, tuple(left)
        self.config = state.config
        self.kept: set[tuple[str, int]] = set()

    def adopt_left(self) -> list[Record]:
        """`adopt` what earlier runs left."""
        return [record for outbox in self.left for record in self.adopt(outbox)]

    def adopt(self, outbox: Path, dead: Container[str] = ()) -> list[Record]:
        """Store the results of an outbox that the storage lacks; returns the records that were changed.

        A driver that is alone also reads the subfolders of the outbox, which are left from a run with several drivers.

        dead: names of drivers that have ended. Their candidates may be taken over.
        """
        found = []
        for path, task, evaluation in delivered(outbox, self.store.alone, self.folder):
            if any(one is not None for one in (task.confirms, task.supernet, task.sibling, task.timing)):
                continue  # recovered elsewhere
            try:
                record = self._record_of(task, evaluation)
            except Exception as error:  # a bad file must not stop the search
                set_aside(path, f"it does not belong to this study: {error}", self.folder)
                continue
            finished = self._adopt(path, record, task, evaluation, dead)
            if finished is not None:
                found.append(finished)
        return found

    def close_half_closed(self) -> int:
        """Close running candidates that have their result; returns how many.

        A kill between two writes to a journal leaves such candidates.
        """
        running = [one for one in self.state.records.values() if one.state == "running" and self.store.owns(one)]
        half = [record for record in running if record.rung_done == record.rung]
        for record in half:
            self.close(record)
        return len(half)

    def close(self, record: Record) -> None:
        """Close a candidate with the result that is already stored."""
        assert record.evaluation is not None
        self.state.records[record.uid] = self.store.finish(record, record.evaluation) or record

    def discard(self, outbox: Path, record: Record, rung: int) -> None:
        """Delete a result from an outbox. Raises RunError when the storage does not have it."""
        if not self.store.holds(record.number, rung):
            raise contradiction(f"candidate {record.number}", f"the database lacks its result at rung {rung}")
        discard(outbox, record.uid, rung)

    def _adopt(
        self, path: Path, record: Record, task: Task, evaluation: Evaluation, dead: Container[str]
    ) -> Record | None:
        is_next = task.rung == record.rung + 1 and record.state == "paused"
        if (record.number < 0 and task.rung == 0) or is_next:  # the storage is an older copy without it
            begun = begin(self.store, replace(record, state="running", rung=task.rung))
            if begun is None:
                return None  # another driver has claimed it
            record = self.state.records[task.uid] = begun
        if record.number < 0:
            set_aside(path, "its smaller budgets are not in the storage", self.folder)
            return None
        finished = None
        if record.state == "running" and record.rung == task.rung:
            if not self.store.owns(record):
                if record.owner not in dead or not self.store.take_over(record):
                    self.kept.add((task.uid, task.rung))
                    return None
                record = replace(record, owner=self.store.owner)
            finished = self.store.finish(record, check_evaluation(evaluation, self.config.deciding_metrics))
            if finished is not None:
                self.state.records[task.uid] = finished
        if self.store.holds(record.number, task.rung):
            delete(path)
        elif not self.store.owns(record):
            self.kept.add((task.uid, task.rung))
        else:
            why = f"its candidate is {record.state} at rung {record.rung} and does not wait for it"
            set_aside(path, why, self.folder)
        return finished

    def _record_of(self, task: Task, evaluation: Evaluation) -> Record:
        """The candidate of an outbox entry; its number is -1 when the study lacks it.

        Raises ValueError when the entry is of another study. Damaged values may raise any exception.
        """
        is_rung = 0 <= task.rung < len(self.config.rungs)
        if not is_rung or (task.uid, task.rung) != (evaluation.uid, evaluation.rung):
            raise ValueError(f"rung {task.rung} of {task.uid} does not fit rung {evaluation.rung} of {evaluation.uid}")
        new = self.state.candidate(task.schedule, dict(task.parameters) or None)
        record = self.state.records.get(new.uid, new)
        expected = task_of(replace(record, rung=task.rung), task.attempt, self.config, self.folder)
        if new.uid != task.uid or not same_work(task, expected):
            raise ValueError("it comes from a study with other settings")
        if record.number < 0:
            self.store.check(record, computed_excess(computed_limits(self.config), self.config.target, record.schedule))
        return record


def begin(store: Store, record: Record) -> Record | None:
    """Claim a new or promoted candidate: write to the storage that this driver runs it. None when another driver was
    faster."""
    if record.rung > 0:
        return replace(record, owner=store.owner) if store.promote(record) else None
    config = store.config
    return store.begin(
        record, computed_excess(computed_limits(config), config.target, record.schedule), config.stop.trials
    )
