"""The search loop between sampler, workers and storage. `driver.run_study` runs it.

A kill at any moment loses no result, because of the order of these steps:

    1. Claim a candidate: the storage says that it runs here.
    2. Submit it. A worker evaluates it, writes the result to the outbox and returns it.
    3. Write the result to the storage.
    4. Claim and submit the next candidate: a promoted one if there is one (`rungs.py`), else a new one.
    5. Delete the result from the outbox.

After a kill, the next start stores the results that are only in the outbox (`recovery.py`). Candidates that run
according to the storage and have no result are evaluated again from their last checkpoint. When several drivers share
a database, another driver may do both at once (`others.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.errors import RunError
from prunesearch.evaluate.outcome import check_evaluation, failed, hopeless
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.record import Record
from prunesearch.relative_limits import dense_problem, dense_record
from prunesearch.schedule import Schedule
from prunesearch.search.events import Done, Event, Finished, Reason, Retrying, Started, Stopping, Submitted
from prunesearch.search.interrupt import Interrupt
from prunesearch.search.others import Others
from prunesearch.search.promotions import Promotions
from prunesearch.search.recovery import Recovery, begin
from prunesearch.search.state import SearchState
from prunesearch.search.tasks import task_of
from prunesearch.space.choices import uid_of
from prunesearch.study.store import Store
from prunesearch.workers.outbox import discard
from prunesearch.workers.protocol import Lost, NoWorkers, Workers

HOPELESS = 5
"""The run ends after this many failures at a rung at which nothing has succeeded."""
STOPPED_BY_HAND = ("interrupted", "cancelled")
GOES_ON = (None, "trials", "exhausted")
"""With these reasons (None: no reason yet) candidates of the study are still completed, promotions included."""
TICK_SECONDS = 0.5


class Search:
    """One run of a study. outbox: folder to which this driver's workers write results."""

    def __init__(
        self,
        state: SearchState,
        store: Store,
        recovery: Recovery,
        others: Others,
        outbox: Path,
        interrupt: Interrupt,
        on_event: Callable[[Event], None],
    ) -> None:
        self.config: StudyConfig = state.config
        self.state, self.store, self.recovery, self.others = state, store, recovery, others
        self.outbox, self.interrupt, self.on_event = outbox, interrupt, on_event
        self.recovered = len(recovery.adopt_left()) + recovery.close_half_closed()
        self.workers: Workers = NoWorkers()
        self.deaths: Counter[tuple[str, int]] = Counter()
        self.failures: list[Evaluation] = []
        self.reason: Reason | None = None
        self.why = ""
        self.start = time.monotonic()

    def has_work(self) -> bool:
        """Whether anything is left to evaluate."""
        total = self.config.stop.trials
        if total is None or len(self.state.records) < total or self.state.count("running"):
            return True
        return Promotions(self.config, self.state.records.values()).next() is not None

    def run(self, workers: Workers) -> Done:
        """Search until there is a reason to stop. Raises RunError when everything fails or the disk is full."""
        self.workers = workers
        self.state.sampler.workers = workers.count
        self.recovered += len(self.recovery.adopt_left())  # a killed driver's workers may have finished meanwhile
        self._take_up()
        try:
            self._fill()
            while self.state.under_way or (self.reason in GOES_ON and self.others.run_something()):
                if not self.state.under_way:
                    time.sleep(TICK_SECONDS)
                for task, outcome in self.workers.wait(TICK_SECONDS):
                    self._handle(task, outcome)
                self._look_for_a_reason_to_stop()
                self.others.look(self.workers.count)
                self._fill()
        except KeyboardInterrupt:  # second signal; candidates running in the storage run again next time
            self.reason = "cancelled"
        done = self._done()
        if done.reason == "dense":
            raise RunError(self.why)
        nothing_works = not any(map(self.state.has_succeeded, range(len(self.config.rungs))))
        if self.failures and (done.reason == "hopeless" or (nothing_works and done.reason not in STOPPED_BY_HAND)):
            raise RunError(hopeless(self._hopeless_failures() or self.failures))
        if done.reason == "disk":
            raise RunError(self.why)
        return done

    def look(self, workers: Workers) -> Done:
        """Summarize the study without submitting anything. workers: those that will confirm the front."""
        self.workers = workers
        self._take_up()
        self.reason = "trials"
        return self._done()

    def _take_up(self) -> None:
        """Teach the sampler earlier results, queue the candidates that this driver left running, and send `Started`."""
        self.state.learn_all()
        records = list(self.state.records.values())
        running = [record for record in records if record.state == "running" and self.store.owns(record)]
        self.state.waiting.extend(sorted(running, key=lambda record: record.number))
        self.on_event(
            Started(
                records=tuple(records),
                total=self.config.stop.trials,
                done=len(records) - len(running),
                rerun=len(running),
                recovered=self.recovered,
                workers=self.workers.description,
            )
        )

    # --- results ---

    def _handle(self, task: Task, outcome: Evaluation | Lost) -> None:
        record = self.state.records[task.uid]
        del self.state.under_way[task.uid]
        if isinstance(outcome, Lost):
            if outcome.cause == "crash" and self._retry(record, outcome):
                return
            outcome = failed(task, outcome.cause, outcome.error)
        if outcome.cause == "disk":  # not the candidate's fault, so it stays running and is evaluated again
            discard(self.outbox, task.uid, task.rung)
            self.why = (
                f"{self.recovery.folder}: a worker could not write ({outcome.error}). What is finished is saved. Free "
                f"some space and run the study again to continue."
            )
            self._stop("disk", "no space is left for weights")
            return
        evaluation = check_evaluation(outcome, self.config.deciding_metrics)
        if evaluation.status == "failed":
            self.failures.append(evaluation)
        after = self.store.finish(record, evaluation)
        if after is None:  # another driver took it over; keep this result until that driver has its own
            self.recovery.kept.add((task.uid, task.rung))
            self.others.leave(task.uid)
            self._fill()
            return
        self.state.finish(after, evaluation)
        submitted = self._submit_all()
        self.on_event(Finished(after, evaluation, self.state.rejected))
        self._tell(submitted)
        self.recovery.discard(self.outbox, after, task.rung)

    def _retry(self, record: Record, lost: Lost) -> bool:
        """Queue the candidate of a dead worker again. False when its retries are used up."""
        which = (record.uid, record.rung)
        self.deaths[which] += 1
        if self.deaths[which] > self.config.workers.retries:
            return False
        self.on_event(Retrying(record, self.deaths[which], lost.error))
        self.state.waiting.appendleft(record)
        self._fill()
        return True

    # --- starting candidates ---

    def _fill(self) -> None:
        """Submit candidates until every worker is busy or there is nothing to do."""
        self._tell(self._submit_all())

    def _submit_all(self) -> list[Submitted]:
        """Fill the free workers. Returns events for the caller to send, so that callbacks do not delay the workers."""
        found: list[Submitted] = []
        while len(self.state.under_way) < self.workers.count:
            self._look_for_a_reason_to_stop()
            if self.reason not in GOES_ON:
                break
            if self.state.waiting:
                submitted = self._submit_again(self.state.waiting.popleft())
            else:
                record = self.state.promoted() or self._new()
                if record is None:
                    break
                submitted = self._submit_claimed(record)
            found += [] if submitted is None else [submitted]
        return found

    def _tell(self, submitted: list[Submitted]) -> None:
        for event in submitted:
            self.on_event(event)

    def _new(self) -> Record | None:
        if self.reason is not None:
            return None
        total = self.config.stop.trials
        if total is not None and len(self.state.records) >= total:
            self.reason = "trials"
            return None
        record = self.state.proposed()
        if record is None:
            self._stop("exhausted", "no further candidate was found within the space and its limits")
        return record

    def _submit_claimed(self, record: Record) -> Submitted | None:
        claimed = begin(self.store, record)
        if claimed is None:  # another driver was faster: read its changes, then choose again
            self.others.look(self.workers.count, at_once=True)
            return None
        self.state.begin(claimed)
        return self._submit(claimed, attempt=0)

    def _submit_again(self, record: Record) -> Submitted | None:
        attempt = self.store.begin_again(record.number)
        if attempt is None:
            self.others.leave(record.uid)
            return None
        return self._submit(record, attempt)

    def _submit(self, record: Record, attempt: int) -> Submitted:
        task = task_of(record, attempt, self.config, self.recovery.folder)
        self.state.under_way[record.uid] = task
        self.workers.submit(task)
        return Submitted(record, attempt)

    # --- ending ---

    def _look_for_a_reason_to_stop(self) -> None:
        hours = self.config.stop.hours
        if self.interrupt.count:
            self._stop("interrupted", f"{self.interrupt.name} came; once more cancels what is running")
        elif hours is not None and self.seconds() >= 3600 * hours:
            self._stop("hours", f"stop.hours ({hours:g}) are over")
        elif why := dense_problem(self.config, dense_record(self.state.records.values())):
            self.why = why
            self._stop("dense", why.splitlines()[0])
        elif failures := self._hopeless_failures():
            self._stop("hopeless", f"nothing but failures so far ({len(failures)})")

    def _hopeless_failures(self) -> list[Evaluation]:
        """The failures of the first rung that looks hopeless, or none.

        A rung is hopeless when nothing succeeded there and either HOPELESS evaluations failed or the dense model failed
        with an error, which every candidate would share.
        """
        dense = uid_of(Schedule(), self.state.shape)
        for rung in sorted({evaluation.rung for evaluation in self.failures}):
            failures = [evaluation for evaluation in self.failures if evaluation.rung == rung]
            is_common = any((one.uid, one.cause) == (dense, "error") for one in failures)
            if (len(failures) >= HOPELESS or is_common) and not self.state.has_succeeded(rung):
                return failures
        return []

    def _stop(self, reason: Reason, why: str) -> None:
        if self.reason in GOES_ON and reason != self.reason:
            self.reason = reason
            self.on_event(Stopping(reason, len(self.state.under_way), why))

    def seconds(self) -> float:
        """Seconds since this run began."""
        return time.monotonic() - self.start

    def _done(self) -> Done:
        assert self.reason is not None, "nothing runs, so something stopped it"
        return Done(
            self.reason,
            complete=self.state.count("complete"),
            failed=self.state.count("failed"),
            running=self.state.count("running"),
            rejected=self.state.rejected,
            seconds=self.seconds(),
            paused=self.state.count("paused"),
        )
