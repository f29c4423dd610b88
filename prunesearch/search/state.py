"""The state of a driver in memory: candidates, sampler, promotions and running tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace

from prunesearch.config import StudyConfig
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.record import Record, State
from prunesearch.samplers import SAMPLERS
from prunesearch.samplers.propose import propose, seed_of
from prunesearch.samplers.sampler_state import SamplerState
from prunesearch.schedule import Schedule
from prunesearch.search.promotions import Promotions
from prunesearch.shape import ModelShape
from prunesearch.space.choices import Value, uid_of


class SearchState:
    """The candidates of a study by uid, and the choice of the next one.

    starts: (origin, schedule) of what is evaluated first. under_way: tasks that workers of this driver run, by uid.
    waiting: queue of candidates that this driver must evaluate again. rejected: number of proposals that were dropped,
    because they break a limit by arithmetic or are already in the study.
    """

    def __init__(
        self, config: StudyConfig, shape: ModelShape, starts: list[tuple[str, Schedule]], records: Iterable[Record]
    ) -> None:
        self.config, self.shape = config, shape
        self.records = {record.uid: record for record in records}
        self.sampler, self.promotions = SamplerState(config), Promotions(config)
        self.under_way: dict[str, Task] = {}
        self.waiting: deque[Record] = deque()
        self.rejected = 0
        self._starts = deque(schedule for _, schedule in starts)
        self._origins = {uid_of(schedule, shape): origin for origin, schedule in reversed(starts)}

    def learn_all(self) -> None:
        """Feed all results so far to the sampler and to the promotions."""
        self.sampler.take_up(self.records.values())
        self.promotions = Promotions(self.config, self.records.values())

    def begin(self, record: Record) -> None:
        """Note that a candidate runs now, here or in another driver."""
        self.records[record.uid] = record
        self.sampler.begin(record)
        self.promotions.add(record)

    def finish(self, record: Record, evaluation: Evaluation) -> None:
        """Note a result that was stored. record: the candidate with this result."""
        self.records[record.uid] = record
        self.sampler.finish(record, evaluation, self.records)
        if record.origin == "dense":  # limits may be relative to it
            self.promotions = Promotions(self.config, self.records.values())
        else:
            self.promotions.add(record)

    def promoted(self) -> Record | None:
        """The candidate to promote now, as a running record at its next rung; None if there is none."""
        best = self.promotions.next()
        return None if best is None else replace(self.records[best.uid], state="running", rung=best.rung + 1)

    def proposed(self) -> Record | None:
        """The next new candidate: a start schedule, else a proposal of the sampler; None when there is none left."""
        while self._starts:
            schedule = self._starts.popleft()
            if uid_of(schedule, self.shape) not in self.records:
                return self.candidate(schedule)
        draws, index = SAMPLERS[self.config.sampler.name].draws, len(self.records)
        proposal = propose(self.config, self.shape, self.sampler.draw, draws, self.sampler.known, self.records, index)
        self.rejected += proposal.rejected
        return None if proposal.schedule is None else self.candidate(proposal.schedule, proposal.parameters)

    def candidate(self, schedule: Schedule, parameters: Mapping[str, Value] | None = None) -> Record:
        """A record for a schedule that the study does not have yet; its number is -1."""
        uid = uid_of(schedule, self.shape)
        seed = seed_of(self.config.sampler.seed, uid)
        return Record(-1, uid, schedule, "running", self._origins.get(uid, "sampler"), seed, parameters=parameters)

    def is_here(self, uid: str) -> bool:
        """Whether this driver runs a candidate or has it in its queue."""
        return uid in self.under_way or any(record.uid == uid for record in self.waiting)

    def count(self, state: State) -> int:
        """Number of candidates in a state."""
        return sum(record.state == state for record in self.records.values())

    def has_succeeded(self, rung: int) -> bool:
        """Whether any evaluation at a rung is complete, other than that of the dense model.

        The dense model runs no score and no verb, so it tells nothing of them.
        """
        dense = uid_of(Schedule(), self.shape)
        return any(record.at(rung) is not None for uid, record in self.records.items() if uid != dense)
