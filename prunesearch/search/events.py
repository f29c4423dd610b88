"""Events of a running search. `run_study(on_event=...)` calls back with these in order, from one thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunesearch.evaluate.task import Evaluation, Split
from prunesearch.record import Record
from prunesearch.search.confirm import Confirmed
from prunesearch.search.shared_weights import SupernetTrained
from prunesearch.search.siblings import SiblingMeasured
from prunesearch.search.speed import Timed

Reason = Literal["trials", "hours", "exhausted", "hopeless", "dense", "disk", "interrupted", "cancelled"]
"""Why a search ended.

trials, hours: `stop.trials` or `stop.hours` was reached. exhausted: there is no further candidate within the limits.
hopeless: all evaluations at a rung failed; `run_study` raises RunError after the running ones have returned. dense: so
does the dense model, and a limit is relative to it; `run_study` raises RunError in the same way. disk: a worker could
not write its weights; its candidate runs again next time. interrupted: asked to stop once; running candidates were
waited for. cancelled: asked to stop twice; they were not waited for."""


@dataclass(frozen=True)
class Checked:
    """The study file has no mistakes. PyTorch is loaded now, data and weights are opened, and workers start."""


@dataclass(frozen=True)
class LookingAtData:
    """The images are being checked before the workers start. Sent every few seconds.

    done, total: images of the split; total is None for a stream.
    """

    split: Split
    done: int
    total: int | None


@dataclass(frozen=True)
class Started:
    """The study is open and workers are ready.

    records: all candidates of the study, running ones included. total: `stop.trials`. rerun: candidates that an earlier
    run of this driver began and did not finish; they run again. done: all candidates but these, so those that other
    drivers run are included. recovered: results that an earlier run left in the outbox or did not close. workers: text
    to show, such as "2 Ray workers, 1 CPU each".
    """

    records: tuple[Record, ...]
    total: int | None
    done: int
    rerun: int
    recovered: int
    workers: str


@dataclass(frozen=True)
class Submitted:
    """A candidate was submitted to the workers at rung `record.rung`. attempt: 0 for the first try at that rung."""

    record: Record
    attempt: int


@dataclass(frozen=True)
class Finished:
    """An evaluation was stored; its candidate is complete, failed, or paused at a lower rung.

    rejected: proposals of this run so far that were not evaluated, because they break a limit by arithmetic or are
    already in the study.
    """

    record: Record
    evaluation: Evaluation
    rejected: int


@dataclass(frozen=True)
class Retrying:
    """A worker died; its candidate is evaluated again."""

    record: Record
    attempt: int
    why: str


@dataclass(frozen=True)
class Waiting:
    """The storage cannot be reached or is full. The search has waited for `waited` seconds; workers continue."""

    why: str
    waited: float


@dataclass(frozen=True)
class Timing:
    """A worker starts that times schedules in turns with the dense model. The others of this driver are closed."""


@dataclass(frozen=True)
class Stopping:
    """No further candidates are submitted. running: how many are waited for. why: text to show."""

    reason: Reason
    running: int
    why: str


@dataclass(frozen=True)
class Done:
    """The run is over and everything is saved. `rejected` and `seconds` are of this run, other counts of the study."""

    reason: Reason
    complete: int
    failed: int
    running: int
    rejected: int
    seconds: float
    paused: int = 0


Event = (
    Checked
    | LookingAtData
    | Started
    | SupernetTrained
    | SiblingMeasured
    | Submitted
    | Finished
    | Retrying
    | Waiting
    | Stopping
    | Confirmed
    | Timing
    | Timed
    | Done
)
