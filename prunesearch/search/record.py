"""One candidate of a study as the storage knows it: what was proposed, and what came back so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunesearch.evaluate.task import Evaluation
from prunesearch.schedule import Schedule

State = Literal["running", "complete", "failed"]


@dataclass(frozen=True)
class Record:
    """A candidate. `number` is its Optuna trial number; `uid` identifies the canonical schedule in the study.

    origin: "dense" (the model as it is, always evaluated first), "start: NAME" (from `start_from`) or
    "sampler". seed: of its task. evaluations: the finished ones, one per rung, lowest rung first; the last one is
    what the front shows.
    """

    number: int
    uid: str
    schedule: Schedule
    state: State
    origin: str
    seed: int
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation with the largest budget so far, or None."""
        return self.evaluations[-1] if self.evaluations else None
