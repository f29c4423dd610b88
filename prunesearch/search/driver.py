"""`run_study`: the loop between sampler, workers and storage. Running an existing study continues it.

The order of the steps is what makes a kill at any moment harmless:

    a worker writes its result to the outbox, then returns it
    1 tell the sampler   2 pick and submit what is next   (the worker is busy again)
    3 write the result   4 write what was picked as running   5 delete the result from the outbox

What is next is a candidate that goes on to a larger budget, if one deserves it (`rungs.py`), else a new one.

What is in the outbox but not in the storage is adopted on the next start, what is running there without a result is
evaluated again, from its last checkpoint, and what was not even written is picked again, the same, from the same
results and seed.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.errors import FileError, RunError
from prunesearch.evaluate import check_files, model_shape
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import write_yaml
from prunesearch.schedule import ModelShape, Schedule
from prunesearch.search.events import Done, Event, Finished, Reason, Retrying, Started, Stopping, Submitted
from prunesearch.search.interrupt import Interrupt
from prunesearch.search.lessons import Lessons
from prunesearch.search.limits import computed_excess
from prunesearch.search.lock import only_driver
from prunesearch.search.outbox import delivered, discard, set_aside
from prunesearch.search.problems import anchors_of, study_problems
from prunesearch.search.promotions import Promotions
from prunesearch.search.propose import propose, seed_of
from prunesearch.search.record import Record, State, with_evaluation
from prunesearch.search.samplers import SAMPLERS
from prunesearch.search.serial_workers import SerialWorkers
from prunesearch.search.study import Store, open_store, storage_url
from prunesearch.search.verdict import failed, hopeless, judged, same_work
from prunesearch.search.workers import EVALUATE, Lost, NoWorkers, Workers
from prunesearch.space import uid_of
from prunesearch.strict import to_mapping

logger = logging.getLogger(__name__)

HOPELESS = 5
"""So many failures at a rung without a single success there end the run."""
STOPPED_BY_HAND = ("interrupted", "cancelled")
TICK_SECONDS = 0.5


def run_study(
    config: StudyConfig,
    folder: Path,
    *,
    storage: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    evaluate: str = EVALUATE,
    make_workers: Callable[[StudyConfig, Path, str], Workers] | None = None,
) -> Done:
    """Search until `config.stop` is reached, Ctrl-C (or SIGTERM) comes, or no candidate is left.

    folder: of the study, made when it is not there; the database goes there unless `storage` (any Optuna URL, or
    journal:FILE, memory:) says otherwise. evaluate: "module:function" of Task -> Evaluation. make_workers: of
    (config, folder, evaluate), instead of those that `config.workers` describes.
    Raises UserErrors before anything runs, RunError when every candidate fails or the storage is lost.
    """
    for plugin in config.plugins:
        importlib.import_module(plugin)
    problems = study_problems(config)
    if problems:
        raise FileError(f"study {config.name}", problems)
    shape = model_shape(config.model)
    if config.workers.address is None:  # else they are on other machines
        check_files(config.model, config.data)
    anchors = anchors_of(config, shape)
    folder = folder.absolute()  # workers may have another working directory
    (folder / "outbox").mkdir(parents=True, exist_ok=True)
    with only_driver(folder):
        store = open_store(config, storage or storage_url(folder))
        try:
            write_yaml(to_mapping(config), folder / "study.yaml", header="prunesearch study, as it was run")
            with Interrupt() as interrupt:
                search = _Search(config, shape, anchors, folder, store, interrupt, on_event)
                make = make_workers or _start_workers
                workers = make(config, folder, evaluate) if search.has_work() else NoWorkers()
                interrupt.listen()  # after Ray, which sets a handler of its own
                try:
                    return search.run(workers)
                finally:
                    workers.close()
        finally:
            store.close()


class _Search:
    """The state of one run."""

    def __init__(
        self,
        config: StudyConfig,
        shape: ModelShape,
        anchors: list[tuple[str, Schedule]],
        folder: Path,
        store: Store,
        interrupt: Interrupt,
        on_event: Callable[[Event], None],
    ) -> None:
        self.config, self.shape, self.folder, self.outbox = config, shape, folder, folder / "outbox"
        self.store, self.interrupt, self.on_event = store, interrupt, on_event
        self.anchors = deque(anchors)
        self.origins = {uid_of(schedule, shape): origin for origin, schedule in reversed(anchors)}
        self.lessons, self.promotions = Lessons(config), Promotions(config)
        self.last_rung = len(config.rungs) - 1
        self.records = {record.uid: record for record in store.records()}
        self.recovered = self._adopt_outbox() + self._close_half_closed()
        self.rerun: deque[Record] = deque()
        self.under_way: dict[str, Task] = {}
        self.unrecorded: list[Record] = []  # submitted, and the storage does not know it yet
        self.deaths: Counter[tuple[str, int]] = Counter()
        self.failures: list[Evaluation] = []
        self.rejected = 0
        self.reason: Reason | None = None
        self.start = time.monotonic()

    def has_work(self) -> bool:
        """Whether anything is left to evaluate."""
        total = self.config.stop.trials
        if total is None or len(self.records) < total or self._count("running"):
            return True
        return Promotions(self.config, self.records.values()).next() is not None

    def run(self, workers: Workers) -> Done:
        self.workers = workers
        self.recovered += self._adopt_outbox()  # again: workers of a killed driver live on for a moment
        self._take_up()
        try:
            self._fill()
            self._record_submitted()
            while self.under_way:
                for task, outcome in self.workers.wait(TICK_SECONDS):
                    self._handle(task, outcome)
                self._look_for_a_reason_to_stop()
        except KeyboardInterrupt:  # the second one; what is running stays so in the storage, and runs again next time
            self.reason = "cancelled"
        done = self._done()
        nothing_works = not any(map(self._has_succeeded, range(len(self.config.rungs))))
        if self.failures and (done.reason == "hopeless" or (nothing_works and done.reason not in STOPPED_BY_HAND)):
            raise RunError(hopeless(self._hopeless_failures() or self.failures))
        self.on_event(done)
        return done

    def _handle(self, task: Task, outcome: Evaluation | Lost) -> None:
        record = self.records[task.uid]
        del self.under_way[task.uid]
        if isinstance(outcome, Lost):
            if outcome.cause == "crash" and self._retry(record, outcome):
                return
            outcome = failed(task, outcome.cause, outcome.error)
        evaluation = judged(outcome, self.config)
        if evaluation.status == "failed":
            self.failures.append(evaluation)
        reached("result")
        after = with_evaluation(record, evaluation, self.store.results, self.last_rung)
        self._learn(after, evaluation)
        self._fill()
        reached("submitted")
        self.store.finish(record, evaluation)
        reached("finished")
        self.on_event(Finished(after, evaluation, self.rejected))
        self._record_submitted()
        reached("begun")
        discard(self.outbox, task.uid, task.rung)
        reached("discarded")

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
        if self.reason not in (None, "trials", "exhausted"):
            return False
        if self.rerun:
            self._submit_again(self.rerun.popleft())
            return True
        record = self._next_promoted() or self._next_new()
        if record is None:
            return False
        self.records[record.uid] = record
        self.lessons.begin(record)
        self.promotions.add(record)
        self._submit(record, attempt=0)
        self.unrecorded.append(record)
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
        while self.anchors:
            _, schedule = self.anchors.popleft()
            if uid_of(schedule, self.shape) not in self.records:
                return self._new_record(schedule)
        draws, index = SAMPLERS[self.config.sampler.name].draws, len(self.records)
        learned = self.lessons
        proposal = propose(self.config, self.shape, learned.draw, draws, learned.known, self.records, index)
        self.rejected += proposal.rejected
        return None if proposal.schedule is None else self._new_record(proposal.schedule)

    def _new_record(self, schedule: Schedule) -> Record:
        uid = uid_of(schedule, self.shape)
        seed = seed_of(self.config.sampler.seed, uid)
        return Record(-1, uid, schedule, "running", self.origins.get(uid, "sampler"), seed)

    def _record_submitted(self) -> None:
        for record in self.unrecorded:
            self._record_begun(record)
            self.on_event(Submitted(self.records[record.uid], attempt=0))
        self.unrecorded.clear()

    def _record_begun(self, record: Record) -> None:
        if record.rung == 0:
            record = self.store.begin(record, computed_excess(self.config, record.schedule))
        else:
            self.store.promote(record)
        self.records[record.uid] = record

    def _submit_again(self, record: Record) -> None:
        attempt = self.store.begin_again(record.number)
        self._submit(record, attempt)
        self.on_event(Submitted(record, attempt))

    def _submit(self, record: Record, attempt: int) -> None:
        task = self._task(record, attempt)
        self.under_way[record.uid] = task
        self.workers.submit(task)

    def _task(self, record: Record, attempt: int) -> Task:
        budget, workers = self.config.rungs[record.rung], self.config.workers
        return Task(
            uid=record.uid,
            model=self.config.model,
            data=self.config.data,
            schedule=record.schedule,
            budget=budget,
            metrics=self.config.metric_names,
            finetune=self.config.finetune,
            measure=self.config.measure,
            rung=record.rung,
            attempt=attempt,
            seed=record.seed,
            device=workers.device,
            threads=max(1, int(workers.cpus_each)),
            resume_from=self._checkpoint_below(record),
            save_to=None if budget.images == 0 else str(self.folder / "weights" / f"{record.uid}.{record.rung}"),
            plugins=self.config.plugins,
        )

    def _checkpoint_below(self, record: Record) -> str | None:
        below = record.at(record.rung - 1)
        if below is None or below.checkpoint is None:
            return None
        if not Path(f"{below.checkpoint}.state").is_file():
            logger.warning("%s.state is gone: rung %d trains from the start", below.checkpoint, record.rung)
            return None
        return below.checkpoint

    def _retry(self, record: Record, lost: Lost) -> bool:
        """Whether the candidate of a dead worker is left to be evaluated again, now or in the next run."""
        which = (record.uid, record.rung)
        self.deaths[which] += 1
        if self.deaths[which] > self.config.workers.retries:
            return False
        self.on_event(Retrying(record, self.deaths[which], lost.error))
        self._look_for_a_reason_to_stop()
        if self.reason in (None, "trials", "exhausted"):
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
        if self.reason in (None, "trials", "exhausted") and reason != self.reason:
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
        running = [record for record in self.records.values() if record.state == "running"]
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

    def _adopt_outbox(self) -> int:
        recovered = 0
        for path, task, evaluation in delivered(self.outbox):
            record = self.records.get(task.uid) or self._new_record(task.schedule)
            begun = replace(record, rung=task.rung)
            if task.rung > self.last_rung or not same_work(task, self._task(begun, task.attempt)):
                set_aside(path, "it comes from a study with other settings")
                continue
            is_next = task.rung == record.rung + 1 and record.state == "paused"
            if (record.number < 0 and task.rung == 0) or is_next:  # it was submitted, and the storage does not know
                self._record_begun(begun)
            elif record.number < 0:
                set_aside(path, "its smaller budgets are not in the storage")
                continue
            record = self.records[task.uid]
            if record.state == "running" and record.rung == task.rung:
                self.records[task.uid] = self.store.finish(record, judged(evaluation, self.config))
                recovered += 1
            discard(self.outbox, task.uid, task.rung)
        return recovered

    def _close_half_closed(self) -> int:
        """The result is there but the candidate is not closed: a kill between two commits, and no outbox."""
        running = [record for record in self.records.values() if record.state == "running"]
        half = [record for record in running if record.rung_done == record.rung]
        for record in half:
            assert record.evaluation is not None
            self.records[record.uid] = self.store.finish(record, record.evaluation)
        return len(half)


def reached(step: str) -> None:
    """Does nothing; tests replace it to die at a step of the loop."""


def _start_workers(config: StudyConfig, folder: Path, evaluate: str) -> Workers:
    if config.workers.kind == "serial":
        return SerialWorkers(config.workers, folder / "outbox", evaluate)
    from prunesearch.search.ray_workers import RayWorkers

    return RayWorkers(config.workers, folder, evaluate)
