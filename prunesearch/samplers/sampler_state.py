"""What the sampler learns: the results of one rung at a time, never a mixture of budgets.

That rung is the highest one with enough results for a model (BOHB, Falkner et al. 2018). When it changes, the sampler
starts over with the results of the new rung, in the order in which they came; so does a search that is continued, and
with one worker both know exactly the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from prunesearch.config import SamplerConfig, StudyConfig
from prunesearch.evaluate import model_shape
from prunesearch.evaluate.limits import excess
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record
from prunesearch.samplers.optuna_samplers import POPULATION, TOKEN_GP, ModelStudy, in_charge
from prunesearch.samplers.propose import build
from prunesearch.space.choices import Value, dimensions, parameters_of

if TYPE_CHECKING:
    from prunesearch.samplers.token_gp import TokenModel

STARTUP = 10
"""Random candidates before a model takes over, where the study file does not say."""


class SamplerState:
    """The model study of the sampler, kept up to date with the records of a study."""

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        startup = config.sampler.startup
        if startup is None:
            startup = POPULATION if config.sampler.name == "nsga2" else STARTUP
        self._enough = max(2 * len(dimensions(config.space)), startup)
        self._parameters: dict[str, dict[str, Value]] = {}
        self._counts = [0] * len(config.rungs)
        self.rung = 0
        """Whose results the sampler knows."""
        self.workers = 1
        """How many there are; `take_up` comes after it is set."""
        self._sampler = self._in_charge()
        self.model = self._new_model()

    @property
    def known(self) -> list[dict[str, Value]]:
        """Parameters of all candidates within the space, in the order of their numbers."""
        return list(self._parameters.values())

    def draw(self, seed: int) -> dict[str, Value]:
        """One proposal for a new candidate; the same results and seed give the same one."""
        return self.model.draw(seed)

    def begin(self, record: Record) -> None:
        """A candidate runs now, at its rung."""
        if record.uid not in self._parameters:
            parameters = self._parameters_of(record)
            if parameters is None:
                return  # no sampler could have proposed it
            self._parameters[record.uid] = parameters
        if record.rung <= self.rung:
            self.model.add(record.uid, self._parameters[record.uid])

    def finish(self, record: Record, evaluation: Evaluation, records: Mapping[str, Record]) -> None:
        """Its evaluation came back; `records` are all of them, by uid, with this one."""
        if record.uid not in self._parameters:
            return
        if evaluation.rung <= self.rung:
            self._tell(record.uid, evaluation)
        self._counts[evaluation.rung] += evaluation.status == "complete"
        if self._best_rung() != self.rung or self._in_charge() != self._sampler:
            self._start_over(records.values())

    def take_up(self, records: Iterable[Record]) -> None:
        """Learn all that an earlier run found."""
        records = sorted(records, key=lambda record: record.number)
        for record in records:
            parameters = self._parameters_of(record)
            if parameters is not None:
                self._parameters[record.uid] = parameters
                for evaluation in record.evaluations:
                    self._counts[evaluation.rung] += evaluation.status == "complete"
        self._start_over(records)

    def _parameters_of(self, record: Record) -> dict[str, Value] | None:
        """What a sampler says for this candidate. With a budget, none says what was not moved onto it."""
        if self._config.budget is not None and record.origin != "sampler":
            return None
        if record.parameters is not None:
            return dict(record.parameters)
        return parameters_of(record.schedule, self._config.space)

    def _start_over(self, records: Iterable[Record]) -> None:
        self.rung, self._sampler = self._best_rung(), self._in_charge()
        self.model = self._new_model()
        inside = [record for record in records if record.uid in self._parameters]
        results = [
            (order, record.number, record.uid, evaluation)
            for record in inside
            for order, evaluation in zip(record.orders, record.evaluations, strict=True)
            if evaluation.rung == self.rung
        ]
        for _, _, uid, evaluation in sorted(results, key=lambda result: result[:2]):
            self.model.add(uid, self._parameters[uid])
            self._tell(uid, evaluation)
        for record in inside:
            if record.state == "running" and record.rung <= self.rung:
                self.model.add(record.uid, self._parameters[record.uid])

    def _tell(self, uid: str, evaluation: Evaluation) -> None:
        if evaluation.status == "failed" or evaluation.rung != self.rung:  # it runs no more, and has no result here
            self.model.tell(uid, None, {})
            return
        values = dict(evaluation.metrics)
        objectives = [values[objective.metric] for objective in self._config.objectives]
        self.model.tell(uid, objectives, excess(self._config, values))

    def _best_rung(self) -> int:
        enough = (rung for rung, count in enumerate(self._counts) if count >= self._enough)
        return max(enough, default=0)

    def _in_charge(self) -> SamplerConfig:
        return in_charge(self._config, len(self._parameters), self.workers)

    def _new_model(self) -> ModelStudy | TokenModel:
        if self._sampler.name != TOKEN_GP:
            return ModelStudy(self._sampler, self._config.space, self._config.objectives)
        from prunesearch.samplers.token_gp import TokenModel

        shape = model_shape(self._config.model)
        return TokenModel(self._config, shape, partial(build, self._config, shape), self._parameters)
