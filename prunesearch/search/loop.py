"""The loop between sampler, workers and storage: what `driver.run_study` runs.

The order of the steps is what makes a kill at any moment harmless:

    a worker writes its result to the outbox, then returns it
    1 tell the sampler   2 pick and submit what is next   (the worker is busy again)
    3 write the result   4 write what was picked as running   5 delete the result from the outbox

What is next is a candidate that goes on to a larger budget, if one deserves it (`rungs.py`), else a new one.

What is in the outbox but not in the storage is adopted on the next start, what is running there without a result is
evaluated again, from its last checkpoint, and what was not even written is picked again, the same, from the same
results and seed.

With a database that was named, several drivers may search together: then a candidate is written, and so claimed,
before it is submitted, and what a dead driver ran is taken over (`team.py`).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.errors import RunError
from prunesearch.evaluate.limits import computed_excess
from prunesearch.evaluate.outcome import check_evaluation, failed, hopeless, same_work
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.record import Record, State, with_evaluation
from prunesearch.samplers import SAMPLERS
from prunesearch.samplers.propose import propose, seed_of
from prunesearch.samplers.sampler_state import SamplerState
from prunesearch.schedule import Schedule
from prunesearch.search.events import Done, Event, Finished, Reason, Retrying, Started, Stopping, Submitted
from prunesearch.search.interrupt import Interrupt
from prunesearch.search.promotions import Promotions
from prunesearch.search.tasks import task_of
from prunesearch.shape import ModelShape
from prunesearch.space.choices import Value, uid_of
from prunesearch.study.lost_database import contradiction
from prunesearch.study.store import Store
from prunesearch.study.team import Team
from prunesearch.workers.outbox import delete, delivered, discard, set_aside
from prunesearch.workers.protocol import Lost, NoWorkers, Workers

HOPELESS = 5
"""So many failures at a rung without a single success there end the run."""
STOPPED_BY_HAND = ("interrupted", "cancelled")
GOES_ON = (None, "trials", "exhausted")
"""As long as nothing else ended the search, what is begun is brought to an end, promotions included."""
TICK_SECONDS = 0.5
LOOK_SECONDS = 1.0
"""How often the storage is asked what other drivers did."""


class Search:
    """The state of one run."""

    def __init__(
        self,
        config: StudyConfig,
        shape: ModelShape,
        starts: list[tuple[str, Schedule]],
        folder: Path,
        store: Store,
        team: Team | None,
        interrupt: Interrupt,
        on_event: Callable[[Event], None],
    ) -> None:
        self.config, self.shape, self.folder = config, shape, folder
        self.store, self.team, self.interrupt, self.on_event = store, team, interrupt, on_event
        self.outbox = folder / "outbox" if team is None else folder / "outbox" / store.owner
        self.starts = deque(starts)
        self.origins = {uid_of(schedule, shape): origin for origin, schedule in reversed(starts)}
        self.lessons, self.promotions = SamplerState(config), Promotions(config)
        self.last_rung = len(config.rungs) - 1
        self.records = {record.uid: record for record in store.records()}
        self.kept: set[tuple[str, int]] = set()  # uid and rung of results in the outbox of what others run by now
        self.recovered = len(self._adopt_outbox(self.outbox)) + len(self._close_half_closed())
        self.rerun: deque[Record] = deque()
        self.looked = 0.0
        self.under_way: dict[str, Task] = {}
        self.unrecorded: list[Record] = []  # submitted, and the storage does not know it yet
        self.deaths: Counter[tuple[str, int]] = Counter()
        self.failures: list[Evaluation] = []
        self.rejected = 0
        self.reason: Reason | None = None
        self.workers: Workers = NoWorkers()
        self.why = ""
        self.start = time.monotonic()

    def has_work(self) -> bool:
        """Whether anything is left to evaluate."""
        total = self.config.stop.trials
        if total is None or len(self.records) < total or self._count("running"):
            return True
        return Promotions(self.config, self.records.values()).next() is not None

    def run(self, workers: Workers) -> Done:
        self.workers = workers
        self.lessons.workers = workers.count
        self.recovered += len(self._adopt_outbox(self.outbox))  # again: workers of a killed driver live on for a moment
        self._take_up()
        try:
            self._fill()
            self._record_submitted()
            while self.under_way or self._others_run():
                if not self.under_way:
                    time.sleep(TICK_SECONDS)
                for task, outcome in self.workers.wait(TICK_SECONDS):
                    self._handle(task, outcome)
                self._look_for_a_reason_to_stop()
                if self.team is not None:
                    self._look_at_the_others()
                    self._fill()
        except KeyboardInterrupt:  # the second one; what is running stays so in the storage, and runs again next time
            self.reason = "cancelled"
        done = self._done()
        nothing_works = not any(map(self._has_succeeded, range(len(self.config.rungs))))
        if self.failures and (done.reason == "hopeless" or (nothing_works and done.reason not in STOPPED_BY_HAND)):
            raise RunError(hopeless(self._hopeless_failures() or self.failures))
        if done.reason == "disk":
            raise RunError(self.why)
        return done

    def look(self) -> Done:
        """Where the study stands; nothing is submitted."""
        self._take_up()
        self.reason = "trials"
        return self._done()

    def _handle(self, task: Task, outcome: Evaluation | Lost) -> None:
        record = self.records[task.uid]
        del self.under_way[task.uid]
        if isinstance(outcome, Lost):
            if outcome.cause == "crash" and self._retry(record, outcome):
                return
            outcome = failed(task, outcome.cause, outcome.error)
        if isinstance(outcome, Evaluation) and outcome.cause == "disk":  # no fault of the candidate
            discard(self.outbox, task.uid, task.rung)
            self.why = (
                f"{self.folder}: a worker could not write ({outcome.error}). What is finished is saved. Free some "
                f"space and run the study again to continue."
            )
            self._stop("disk", "no space is left for weights")
            return
        evaluation = check_evaluation(outcome, self.config)
        if evaluation.status == "failed":
            self.failures.append(evaluation)
        after = with_evaluation(record, evaluation, self.store.results, self.last_rung)
        if self.team is None:
            self._learn(after, evaluation)
            self._fill()
        if self.store.finish(record, evaluation) is None:  # another driver took it over
            self.kept.add((task.uid, task.rung))  # until that one has a result, or dies
            self._leave_to_the_others(task.uid)
            self._fill()
            return
        if self.team is not None:  # after it was written: the others must find it closed before anyone promotes it
            self._learn(after, evaluation)
            self._fill()
        self.on_event(Finished(after, evaluation, self.rejected))
        self._record_submitted()
        self._discard(record, task.rung)

    def _discard(self, record: Record, rung: int) -> None:
        """Delete a result from the outbox, now that the storage has it."""
        if not self.store.holds(record.number, rung):
            raise contradiction(f"candidate {record.number}", f"the database lacks its result at rung {rung}")
        discard(self.outbox, record.uid, rung)

    def _learn(self, record: Record, evaluation: Evaluation) -> None:
        self.records[record.uid] = record
        self.lessons.finish(record, evaluation, self.records)
        self.promotions.add(record)

    # --- starting candidates ---

    def _fill(self) -> None:
        """Give every free worker something to do, as long as there is something."""
        while len(self.under_way) < self.workers.count and self._submit_next():
            pass

    def _submit_next(self) -> bool:
        self._look_for_a_reason_to_stop()
        if self.reason not in GOES_ON:
            return False
        if self.rerun:
            self._submit_again(self.rerun.popleft())
            return True
        record = self._next_promoted() or self._next_new()
        if record is None:
            return False
        if self.team is not None:
            if not self._record_begun(record):  # another driver was faster; with what it did in mind, pick again
                self._look_at_the_others(at_once=True)
                return True
            record = self.records[record.uid]
        self.records[record.uid] = record
        self.lessons.begin(record)
        self.promotions.add(record)
        self._submit(record, attempt=0)
        if self.team is None:
            self.unrecorded.append(record)
        else:
            self.on_event(Submitted(record, attempt=0))
        return True

    def _next_promoted(self) -> Record | None:
        best = self.promotions.next()
        return None if best is None else replace(self.records[best.uid], state="running", rung=best.rung + 1)

    def _next_new(self) -> Record | None:
        if self.reason is not None:
            return None
        total = self.config.stop.trials
        if total is not None and len(self.records) >= total:
            self.reason = "trials"
            return None
        record = self._next_candidate()
        if record is None:
            self._stop("exhausted", "there is no further candidate within the space and its limits")
        return record

    def _next_candidate(self) -> Record | None:
        while self.starts:
            _, schedule = self.starts.popleft()
            if uid_of(schedule, self.shape) not in self.records:
                return self._new_record(schedule)
        draws, index = SAMPLERS[self.config.sampler.name].draws, len(self.records)
        learned = self.lessons
        proposal = propose(self.config, self.shape, learned.draw, draws, learned.known, self.records, index)
        self.rejected += proposal.rejected
        return None if proposal.schedule is None else self._new_record(proposal.schedule, proposal.parameters)

    def _new_record(self, schedule: Schedule, parameters: Mapping[str, Value] | None = None) -> Record:
        uid = uid_of(schedule, self.shape)
        seed = seed_of(self.config.sampler.seed, uid)
        return Record(-1, uid, schedule, "running", self.origins.get(uid, "sampler"), seed, parameters=parameters)

    def _record_submitted(self) -> None:
        for record in self.unrecorded:
            self._record_begun(record)
            self.on_event(Submitted(self.records[record.uid], attempt=0))
        self.unrecorded.clear()

    def _record_begun(self, record: Record) -> bool:
        """Whether it is this driver's; alone it always is."""
        begun: Record | None = record
        if record.rung == 0:
            excess = computed_excess(self.config, record.schedule)
            begun = self.store.begin(record, excess, self.config.stop.trials)
        elif not self.store.promote(record):
            begun = None
        if begun is not None:
            self.records[record.uid] = replace(begun, owner=self.store.owner)
        return begun is not None

    def _submit_again(self, record: Record) -> None:
        attempt = self.store.begin_again(record.number)
        if attempt is None:
            self._leave_to_the_others(record.uid)
            return
        self._submit(record, attempt)
        self.on_event(Submitted(record, attempt))

    def _submit(self, record: Record, attempt: int) -> None:
        task = task_of(record, attempt, self.config, self.folder)
        self.under_way[record.uid] = task
        self.workers.submit(task)

    def _retry(self, record: Record, lost: Lost) -> bool:
        """Whether the candidate of a dead worker is left to be evaluated again, now or in the next run."""
        which = (record.uid, record.rung)
        self.deaths[which] += 1
        if self.deaths[which] > self.config.workers.retries:
            return False
        self.on_event(Retrying(record, self.deaths[which], lost.error))
        self._look_for_a_reason_to_stop()
        if self.reason in GOES_ON:
            self._submit_again(record)
        return True

    # --- ending ---

    def _look_for_a_reason_to_stop(self) -> None:
        hours = self.config.stop.hours
        if self.interrupt.count:
            self._stop("interrupted", f"{self.interrupt.name} came; once more cancels what is running")
        elif hours is not None and time.monotonic() - self.start >= 3600 * hours:
            self._stop("hours", f"stop.hours ({hours:g}) are over")
        elif failures := self._hopeless_failures():
            self._stop("hopeless", f"nothing but failures so far ({len(failures)})")

    def _hopeless_failures(self) -> list[Evaluation]:
        """Of a rung where nothing succeeds: many, or one that is an error of the dense model, which none will do
        without. Else none."""
        dense = uid_of(Schedule(), self.shape)
        for rung in sorted({evaluation.rung for evaluation in self.failures}):
            failures = [evaluation for evaluation in self.failures if evaluation.rung == rung]
            is_common = any((one.uid, one.cause) == (dense, "error") for one in failures)
            if (len(failures) >= HOPELESS or is_common) and not self._has_succeeded(rung):
                return failures
        return []

    def _has_succeeded(self, rung: int) -> bool:
        return any(record.at(rung) is not None for record in self.records.values())

    def _stop(self, reason: Reason, why: str) -> None:
        if self.reason in GOES_ON and reason != self.reason:
            self.reason = reason
            self.on_event(Stopping(reason, len(self.under_way), why))

    def _count(self, state: State) -> int:
        return sum(record.state == state for record in self.records.values())

    def _done(self) -> Done:
        assert self.reason is not None, "nothing runs, so something stopped it"
        return Done(
            self.reason,
            complete=self._count("complete"),
            failed=self._count("failed"),
            running=self._count("running"),
            rejected=self.rejected,
            seconds=time.monotonic() - self.start,
            paused=self._count("paused"),
        )

    # --- continuing ---

    def _take_up(self) -> None:
        """Teach the sampler what an earlier run found, and say where the search stands."""
        self.lessons.take_up(self.records.values())
        self.promotions = Promotions(self.config, self.records.values())
        running = [record for record in self.records.values() if record.state == "running" and self._is_mine(record)]
        self.rerun.extend(sorted(running, key=lambda record: record.number))
        self.on_event(
            Started(
                records=tuple(self.records.values()),
                total=self.config.stop.trials,
                done=len(self.records) - len(self.rerun),
                rerun=len(self.rerun),
                recovered=self.recovered,
                workers=self.workers.description,
            )
        )

    def _is_mine(self, record: Record) -> bool:
        return self.team is None or record.owner == self.store.owner

    def _adopt_outbox(self, outbox: Path, dead: Container[str] = ()) -> list[Record]:
        """Finish what is in an outbox and not in the storage; returns what was finished. Alone, this includes the
        outboxes of drivers that once were several. dead: drivers whose candidates may be taken over for that."""
        adopted = []
        for path, task, evaluation in delivered(outbox, deep=self.team is None):
            if "." in task.uid or task.supernet is not None:  # of the front measured again; shared weights are a file
                continue
            try:
                record = self._record_of(task, evaluation)
            except Exception as error:  # whatever the file says, it must not stop the search
                set_aside(path, f"it does not belong to this study: {error}")
                continue
            is_next = task.rung == record.rung + 1 and record.state == "paused"
            if (record.number < 0 and task.rung == 0) or is_next:  # it was submitted, and the storage does not know
                if not self._record_begun(replace(record, state="running", rung=task.rung)):
                    continue  # another driver is at it
                record = self.records[task.uid]
            if record.number < 0:
                set_aside(path, "its smaller budgets are not in the storage")
                continue
            if record.state == "running" and record.rung == task.rung and not self._is_mine(record):
                if record.owner not in dead or not self.store.take_over(record):
                    self.kept.add((task.uid, task.rung))
                    continue
                record = replace(record, owner=self.store.owner)
            if record.state == "running" and record.rung == task.rung:
                after = self.store.finish(record, check_evaluation(evaluation, self.config))
                if after is not None:
                    self.records[task.uid] = after
                    adopted.append(after)
            if self.store.holds(record.number, task.rung):
                delete(path)
            elif not self._is_mine(record):
                self.kept.add((task.uid, task.rung))
            else:
                set_aside(path, f"its candidate is {record.state} at rung {record.rung} and does not wait for it")
        return adopted

    def _record_of(self, task: Task, evaluation: Evaluation) -> Record:
        """The candidate that an outbox entry is about, with number -1 when the study lacks it. Raises ValueError when
        it is of another study, and anything for values that make no sense."""
        if not 0 <= task.rung <= self.last_rung or (task.uid, task.rung) != (evaluation.uid, evaluation.rung):
            raise ValueError(f"rung {task.rung} of {task.uid} does not fit rung {evaluation.rung} of {evaluation.uid}")
        new = self._new_record(task.schedule, dict(task.parameters) or None)
        record = self.records.get(new.uid, new)
        expected = task_of(replace(record, rung=task.rung), task.attempt, self.config, self.folder)
        if new.uid != task.uid or not same_work(task, expected):
            raise ValueError("it comes from a study with other settings")
        if record.number < 0:
            self.store.check(record, computed_excess(self.config, record.schedule))
        return record

    def _close_half_closed(self) -> list[Record]:
        """The result is there but the candidate is not closed: a kill between two writes to a journal."""
        running = [record for record in self.records.values() if record.state == "running" and self._is_mine(record)]
        half = [record for record in running if record.rung_done == record.rung]
        for record in half:
            self._close(record)
        return half

    def _close(self, record: Record) -> None:
        assert record.evaluation is not None
        self.records[record.uid] = self.store.finish(record, record.evaluation) or record

    # --- together with other drivers ---

    def _others_run(self) -> bool:
        """True while other drivers run candidates. Their results can trigger promotions here, and their candidates must
        be taken over if they die."""
        if self.team is None or self.reason not in GOES_ON:
            return False
        return bool(self.rerun) or any(not self._is_here(record) for record in self.store.running())

    def _is_here(self, record: Record) -> bool:
        """Whether this driver is at work on it."""
        return record.uid in self.under_way or any(record.uid == waiting.uid for waiting in self.rerun)

    def _look_at_the_others(self, at_once: bool = False) -> None:
        """Learn what other drivers found, and take over what dead ones ran."""
        if self.team is None or (time.monotonic() - self.looked < LOOK_SECONDS and not at_once):
            return
        self.looked = time.monotonic()
        for record in self.store.poll():
            if not self._is_here(record):
                self._learn_of(record)
        self._take_over(self.team)

    def _leave_to_the_others(self, uid: str) -> None:
        """This candidate is not this driver's any more, or another one has its result already."""
        record = self.store.find(uid)
        if record is not None:
            self._learn_of(record)

    def _learn_of(self, record: Record) -> None:
        known = self.records.get(record.uid)
        self.records[record.uid] = record
        if known is None:
            self.lessons.begin(record)
        for evaluation in record.evaluations[0 if known is None else len(known.evaluations) :]:
            self.lessons.finish(record, evaluation, self.records)
            self.on_event(Finished(record, evaluation, self.rejected))
            if (record.uid, evaluation.rung) in self.kept:  # another driver has evaluated it as well
                self.kept.remove((record.uid, evaluation.rung))
                discard(self.outbox, record.uid, evaluation.rung)
        self.promotions.add(record)

    def _take_over(self, team: Team) -> None:
        """Adopt what dead drivers finished, and evaluate again what they ran, as far as workers are free."""
        elsewhere = [record for record in self.store.running() if not self._is_here(record)]
        dead = team.dead({record.owner for record in elsewhere if not self._is_mine(record)})
        places = [place for owner in sorted(dead) for place in team.outboxes(owner, self.folder)]
        if dead and self.kept:  # what this driver finished after others had taken it over
            places.append(self.outbox)
        for record in (record for place in places for record in self._adopt_outbox(place, dead)):
            self.recovered += 1
            if record.evaluation is not None:
                self._learn(record, record.evaluation)
                self.on_event(Finished(record, record.evaluation, self.rejected))
        for record in elsewhere:
            if len(self.under_way) + len(self.rerun) >= self.workers.count:
                break  # the others, who may be free, shall have the rest
            if record.owner in dead and self.records[record.uid].state == "running" and self.store.take_over(record):
                self._run_again(replace(record, owner=self.store.owner))

    def _run_again(self, record: Record) -> None:
        """Queue what runs nowhere; when only its closing is missing, close it."""
        self.records[record.uid] = record
        if record.rung_done == record.rung:
            self._close(record)
        else:
            self.rerun.append(record)
