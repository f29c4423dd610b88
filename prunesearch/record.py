"""`Record`: one candidate of a study as the storage keeps it, with its schedule and its evaluations so far.

`Sibling`: a smaller dense model that the front is compared with. It is no candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prunesearch.config import ModelConfig, Objective
from prunesearch.evaluate.task import Evaluation, Speed
from prunesearch.schedule import Schedule
from prunesearch.space.choices import Value

SENSITIVITY = "start: sensitivity"
"""Origin of start schedules that were predicted from sensitivities."""
SPEED = "speed"
"""Speeds of a study are stored as a confirmation of this name; see `search.speed`."""
State = Literal["running", "paused", "complete", "failed"]
"""paused: evaluated at a lower rung and not promoted yet. complete: evaluated at the highest rung."""


@dataclass(frozen=True)
class Record:
    """A candidate. `number` is its Optuna trial number; `uid` identifies the canonical schedule in the study.

    origin: "dense" (the unpruned model, always evaluated first), "start: NAME" (from `start_from`) or "sampler".
    seed: the seed of its tasks. evaluations: the finished ones, one per rung, lowest rung first.
    orders: for each evaluation, how many the study had before it. rung: the rung that runs, else the last finished.
    parameters: the sampler's values. owner: the driver that runs or last ran it.
    confirmations: evaluations with fresh seeds. speed: how many times as fast as the dense model, timed in turns.
    """

    number: int
    uid: str
    schedule: Schedule
    state: State
    origin: str
    seed: int
    evaluations: tuple[Evaluation, ...] = ()
    orders: tuple[int, ...] = ()
    rung: int = 0
    parameters: Mapping[str, Value] | None = None
    owner: str = ""
    confirmations: tuple[Evaluation, ...] = ()
    speed: Speed | None = None

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation with the largest budget so far, or None."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def outcome(self) -> Schedule:
        """The schedule as it was measured, with its learned thresholds."""
        learned = None if self.evaluation is None else self.evaluation.schedule
        return learned or self.schedule

    @property
    def rung_done(self) -> int:
        """The rung of the last evaluation; -1 when there is none."""
        return self.evaluations[-1].rung if self.evaluations else -1

    @property
    def is_start(self) -> bool:
        """True for the dense model and the start schedules: they are evaluated at every rung, whatever their result."""
        return self.origin != "sampler"

    def at(self, rung: int) -> Evaluation | None:
        """The complete evaluation at a rung, or None."""
        found = (one for one in self.evaluations if one.rung == rung and one.status == "complete")
        return next(found, None)


@dataclass(frozen=True)
class Sibling:
    """A dense model beside the candidates of a study, measured as it comes; evaluation: None before that.

    uid: identity of its evaluation; see `search.siblings.uid_of`.
    """

    uid: str
    model: ModelConfig
    evaluation: Evaluation | None = None

    @property
    def name(self) -> str:
        """The name of the model, with that of its checkpoint if it has one."""
        return self.model.name + self._checkpoint

    @property
    def short_name(self) -> str:
        """`name` without the tag of timm's weights."""
        return self.model.name.partition(".")[0] + self._checkpoint

    @property
    def _checkpoint(self) -> str:
        return "" if self.model.checkpoint is None else f" ({Path(self.model.checkpoint).stem})"


def with_evaluation(record: Record, evaluation: Evaluation, order: int, last_rung: int) -> Record:
    """The record with one more evaluation. A second evaluation of a rung replaces the first and keeps its order."""
    before = [(one, place) for one, place in zip(record.evaluations, record.orders, strict=True)]
    known = [place for one, place in before if one.rung == evaluation.rung]
    before = [(one, place) for one, place in before if one.rung != evaluation.rung]
    evaluations, orders = zip(*before, (evaluation, known[0] if known else order), strict=True)
    state: State = "paused" if evaluation.rung < last_rung else "complete"
    state = "failed" if evaluation.status == "failed" else state
    return replace(record, state=state, evaluations=evaluations, orders=orders, rung=evaluation.rung)


def cost_of(objectives: Sequence[Objective]) -> str | None:
    """The metric that is a candidate's cost: gmacs, else the first minimized objective; None when there is none."""
    minimized = [objective.metric for objective in objectives if objective.goal == "minimize"]
    return "gmacs" if "gmacs" in minimized else next(iter(minimized), None)
