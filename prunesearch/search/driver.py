"""`run_study`: the loop between sampler, workers and storage. Running an existing study continues it.

The order of the steps is what makes a kill at any moment harmless:

    a worker writes its result to the outbox, then returns it
    1 tell the sampler   2 pick and submit the next candidate   (the worker is busy again)
    3 write the result   4 write the new candidate as running   5 delete the result from the outbox

What is in the outbox but not in the storage is adopted on the next start, what is running there without a result is
evaluated again, and a candidate that was not even written is drawn again, the same one, from the same seed.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.errors import FileError, RunError
from prunesearch.evaluate import check_files, model_shape
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import write_yaml
from prunesearch.schedule import ModelShape, Schedule
from prunesearch.search.events import Done, Event, Finished, Reason, Retrying, Started, Stopping, Submitted
from prunesearch.search.interrupt import Interrupt
from prunesearch.search.limits import computed_excess, excess
from prunesearch.search.lock import only_driver
from prunesearch.search.outbox import delivered, discard, set_aside
from prunesearch.search.problems import anchors_of, study_problems
from prunesearch.search.propose import propose, seed_of
from prunesearch.search.record import Record, State
from prunesearch.search.samplers import SAMPLERS, ModelStudy
from prunesearch.search.serial_workers import SerialWorkers
from prunesearch.search.study import Store, open_store, storage_url
from prunesearch.search.verdict import failed, hopeless, judged, same_work
from prunesearch.search.workers import EVALUATE, Lost, NoWorkers, Workers
from prunesearch.space import Value, parameters_of, uid_of
from prunesearch.strict import to_mapping

HOPELESS = 5
"""So many failures without a single success end the run."""
TICK_SECONDS = 0.5


def run_study(
    config: StudyConfig,
    folder: Path,
    *,
    storage: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    evaluate: str = EVALUATE,
) -> Done:
    """Search until `config.stop` is reached, Ctrl-C (or SIGTERM) comes, or no candidate is left.

    folder: of the study, made when it is not there; the database goes there unless `storage` (any Optuna URL, or
    journal:FILE) says otherwise. evaluate: "module:function" of Task -> Evaluation.
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
                workers = _start_workers(config, folder, evaluate) if search.has_work() else NoWorkers()
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
        self.model = ModelStudy(config.sampler, config.space, config.objectives)
        self.known: list[dict[str, Value]] = []  # parameters of all candidates, from which mutations start
        self.records = {record.uid: record for record in store.records()}
        self.recovered = self._adopt_outbox() + self._close_half_closed()
        self.rerun: deque[Record] = deque()
        self.under_way: dict[str, Task] = {}
        self.deaths: Counter[str] = Counter()
        self.failures: list[Evaluation] = []
        self.rejected = 0
        self.reason: Reason | None = None
        self.start = time.monotonic()

    def has_work(self) -> bool:
        """Whether anything is left to evaluate."""
        total = self.config.stop.trials
        has_room = total is None or len(self.records) < total
        return has_room or any(record.state == "running" for record in self.records.values())

    def run(self, workers: Workers) -> Done:
        self.workers = workers
        self.recovered += self._adopt_outbox()  # again: workers of a killed driver live on for a moment
        self._take_up()
        try:
            for _ in range(self.workers.count):
                self._record_new(self._submit_next())
            while self.under_way:
                for task, outcome in self.workers.wait(TICK_SECONDS):
                    self._handle(task, outcome)
                self._look_for_a_reason_to_stop()
        except KeyboardInterrupt:  # the second one; what is running stays so in the storage, and runs again next time
            self.reason = "cancelled"
        done = self._done()
        if done.complete == 0 and self.failures and done.reason not in ("interrupted", "cancelled"):
            raise RunError(hopeless(self.failures))
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
        self._tell(task.uid, evaluation)
        new = self._submit_next()
        reached("submitted")
        self.records[task.uid] = record = self.store.finish(record, evaluation)
        reached("finished")
        self._record_new(new)
        reached("begun")
        discard(self.outbox, task.uid, task.rung)
        reached("discarded")
        self.on_event(Finished(record, evaluation, self.rejected))

    # --- starting candidates ---

    def _submit_next(self) -> Record | None:
        """Give a free worker something to do. The result, if any, is a candidate that the storage does not know yet."""
        self._look_for_a_reason_to_stop()
        if self.reason is not None:
            return None
        if self.rerun:
            self._submit_again(self.rerun.popleft())
            return None
        total = self.config.stop.trials
        if total is not None and len(self.records) >= total:
            self.reason = "trials"
            return None
        record = self._next_candidate()
        if record is None:
            self._stop("exhausted", "there is no further candidate within the space and its limits")
            return None
        self.records[record.uid] = record
        self._add_to_model(record)
        self._submit(record, attempt=0)
        return record

    def _next_candidate(self) -> Record | None:
        while self.anchors:
            _, schedule = self.anchors.popleft()
            if uid_of(schedule, self.shape) not in self.records:
                return self._new_record(schedule)
        draws, index = SAMPLERS[self.config.sampler.name].draws, len(self.records)
        proposal = propose(self.config, self.shape, self.model.draw, draws, self.known, self.records, index)
        self.rejected += proposal.rejected
        return None if proposal.schedule is None else self._new_record(proposal.schedule)

    def _new_record(self, schedule: Schedule) -> Record:
        uid = uid_of(schedule, self.shape)
        seed = seed_of(self.config.sampler.seed, uid)
        return Record(-1, uid, schedule, "running", self.origins.get(uid, "sampler"), seed)

    def _record_new(self, record: Record | None) -> None:
        if record is not None:
            record = self.store.begin(record, computed_excess(self.config, record.schedule))
            self.records[record.uid] = record
            self.on_event(Submitted(record, attempt=0))

    def _submit_again(self, record: Record) -> None:
        attempt = self.store.begin_again(record.number)
        self._submit(record, attempt)
        self.on_event(Submitted(record, attempt))

    def _submit(self, record: Record, attempt: int) -> None:
        task = self._task(record, attempt)
        self.under_way[record.uid] = task
        self.workers.submit(task)

    def _task(self, record: Record, attempt: int) -> Task:
        budget, workers = self.config.rungs[0], self.config.workers
        return Task(
            uid=record.uid,
            model=self.config.model,
            data=self.config.data,
            schedule=record.schedule,
            budget=budget,
            metrics=self.config.metric_names,
            finetune=self.config.finetune,
            measure=self.config.measure,
            attempt=attempt,
            seed=record.seed,
            device=workers.device,
            threads=max(1, int(workers.cpus_each)),
            save_to=None if budget.images == 0 else str(self.folder / "weights" / record.uid),
            plugins=self.config.plugins,
        )

    def _retry(self, record: Record, lost: Lost) -> bool:
        """Whether the candidate of a dead worker is left to be evaluated again, now or in the next run."""
        self.deaths[record.uid] += 1
        if self.deaths[record.uid] > self.config.workers.retries:
            return False
        self.on_event(Retrying(record, self.deaths[record.uid], lost.error))
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
        elif self._is_hopeless():
            self._stop("hopeless", f"nothing but failures so far ({len(self.failures)})")

    def _is_hopeless(self) -> bool:
        """Only failures, and many; or an error of the dense model, which no candidate will do without."""
        if self._count("complete"):
            return False
        dense = uid_of(Schedule(), self.shape)
        return len(self.failures) >= HOPELESS or any((e.uid, e.cause) == (dense, "error") for e in self.failures)

    def _stop(self, reason: Reason, why: str) -> None:
        if self.reason in (None, "trials") and reason != self.reason:
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
        )

    # --- what the sampler learns ---

    def _add_to_model(self, record: Record) -> None:
        parameters = parameters_of(record.schedule, self.config.space)
        if parameters is not None:
            self.model.add(record.uid, parameters)
            self.known.append(parameters)

    def _tell(self, uid: str, evaluation: Evaluation) -> None:
        if evaluation.status == "failed":
            self.model.tell(uid, None, {})
            return
        values = dict(evaluation.metrics)
        objectives = [values[objective.metric] for objective in self.config.objectives]
        self.model.tell(uid, objectives, excess(self.config, values))

    # --- continuing ---

    def _take_up(self) -> None:
        """Teach the sampler what an earlier run found, in the order of the numbers, and say where the search stands."""
        for record in sorted(self.records.values(), key=lambda record: record.number):
            self._add_to_model(record)
            if record.evaluation is not None:
                self._tell(record.uid, record.evaluation)
            if record.state == "running":
                self.rerun.append(record)
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
            if not same_work(task, self._task(record, task.attempt)):
                set_aside(path, "it comes from a study with other settings")
                continue
            if record.number < 0:
                record = self.store.begin(record, computed_excess(self.config, record.schedule))
            if record.state == "running":
                record = self.store.finish(record, judged(evaluation, self.config))
                recovered += 1
            self.records[record.uid] = record
            discard(self.outbox, task.uid, task.rung)
        return recovered

    def _close_half_closed(self) -> int:
        """The result is there but the candidate is not closed: a kill between two commits, and no outbox."""
        half = [record for record in self.records.values() if record.state == "running" and record.evaluation]
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
