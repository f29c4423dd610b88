"""The sampler of a study, told the results of one rung at a time, never of a mixture of budgets.

That rung is the highest one with enough results for a model (BOHB, Falkner et al. 2018). When it changes, the sampler
starts over with the results of the new rung, in the order in which they came. A search that is continued starts over
in the same way, so that with one worker its sampler knows exactly what it would have known without the interruption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial

from prunesearch.config import StudyConfig
from prunesearch.evaluate import model_shape
from prunesearch.evaluate.limits import Limits, excess
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record
from prunesearch.relative_limits import dense_record, limits_at
from prunesearch.samplers.propose import build
from prunesearch.samplers.proposer import SAMPLERS, Proposer, ProposerSettings, Sampler, in_charge
from prunesearch.space.choices import Value, dimensions, parameters_of


class SamplerState:
    """The proposer of a study, kept up to date with its records."""

    def __init__(self, config: StudyConfig) -> None:
        self._config, self._own = config, SAMPLERS[config.sampler.name]
        self._enough = max(2 * len(dimensions(config.space)), self._startup(self._own))
        self._parameters: dict[str, dict[str, Value]] = {}
        self._counts = [0] * len(config.rungs)
        self.rung = 0
        """The rung whose results the sampler knows."""
        self.workers = 1
        """How many there are; to be set before `take_up`."""
        self._limits = limits_at(config, None, self.rung)
        self._sampler = self._in_charge()
        self._proposer = self._new_proposer()

    @property
    def known(self) -> list[dict[str, Value]]:
        """Parameters of all candidates within the space, in the order of their numbers."""
        return list(self._parameters.values())

    def draw(self, seed: int) -> dict[str, Value]:
        """One proposal for a new candidate; the same results and seed give the same one."""
        return self._proposer.draw(seed)

    def begin(self, record: Record) -> None:
        """A candidate runs now, at the rung that its record says."""
        if record.uid not in self._parameters:
            parameters = self._parameters_of(record)
            if parameters is None:
                return  # it lies outside the space
            self._parameters[record.uid] = parameters
        if record.rung <= self.rung:
            self._proposer.add(record.uid, self._parameters[record.uid])

    def finish(self, record: Record, evaluation: Evaluation, records: Mapping[str, Record]) -> None:
        """An evaluation of a candidate came back. records: all of the study by uid, this one included."""
        starts_over = self._limits_in(records.values(), self.rung) != self._limits  # the dense model has a result
        if record.uid in self._parameters:
            if evaluation.rung <= self.rung:
                self._tell(record.uid, evaluation)
            self._counts[evaluation.rung] += evaluation.status == "complete"
            starts_over |= self._best_rung() != self.rung or self._in_charge() != self._sampler
        if starts_over:
            self._start_over(records.values())

    def take_up(self, records: Iterable[Record]) -> None:
        """Start over with all that earlier runs found."""
        records = sorted(records, key=lambda record: record.number)
        for record in records:
            parameters = self._parameters_of(record)
            if parameters is not None:
                self._parameters[record.uid] = parameters
                for evaluation in record.evaluations:
                    self._counts[evaluation.rung] += evaluation.status == "complete"
        self._start_over(records)

    def _parameters_of(self, record: Record) -> dict[str, Value] | None:
        """The parameters that a sampler would have proposed for a candidate; None when it could not. With a budget it
        proposes only what is then moved onto the budget, so start schedules and the dense model are left out."""
        if self._config.budget is not None and record.origin != "sampler":
            return None
        if record.parameters is not None:
            return dict(record.parameters)
        return parameters_of(record.schedule, self._config.space)

    def _limits_in(self, records: Iterable[Record], rung: int) -> Limits:
        return limits_at(self._config, dense_record(records), rung)

    def _start_over(self, records: Collection[Record]) -> None:
        self.rung, self._sampler = self._best_rung(), self._in_charge()
        self._limits = self._limits_in(records, self.rung)
        self._proposer = self._new_proposer()
        inside = [record for record in records if record.uid in self._parameters]
        results = [
            (order, record.number, record.uid, evaluation)
            for record in inside
            for order, evaluation in zip(record.orders, record.evaluations, strict=True)
            if evaluation.rung == self.rung
        ]
        for _, _, uid, evaluation in sorted(results, key=lambda result: result[:2]):
            self._proposer.add(uid, self._parameters[uid])
            self._tell(uid, evaluation)
        for record in inside:
            if record.state == "running" and record.rung <= self.rung:
                self._proposer.add(record.uid, self._parameters[record.uid])

    def _tell(self, uid: str, evaluation: Evaluation) -> None:
        if evaluation.status == "failed" or evaluation.rung != self.rung:  # it has no result at the rung that is told
            self._proposer.tell(uid, None, {})
            return
        values = dict(evaluation.metrics)
        objectives = [values[objective.metric] for objective in self._config.objectives]
        self._proposer.tell(uid, objectives, excess(self._limits, values))

    def _best_rung(self) -> int:
        enough = (rung for rung, count in enumerate(self._counts) if count >= self._enough)
        return max(enough, default=0)

    def _startup(self, sampler: Sampler) -> int:
        """Of the study file, which speaks of its own sampler only; else the sampler's default."""
        startup = self._config.sampler.startup
        return sampler.startup if startup is None or sampler != self._own else startup

    def _in_charge(self) -> Sampler:
        return in_charge(self._own, len(self._parameters), self.workers)

    def _new_proposer(self) -> Proposer:
        config, sampler = self._config, self._sampler
        shape = model_shape(config.model)
        settings = ProposerSettings(
            sampler,
            max(self._startup(sampler), sampler.least_startup),
            config.space,
            config.objectives,
            self._limits,
            config.target,
            shape,
            build=partial(build, config, shape),
            seen=self._parameters,
        )
        return sampler.make(settings)
