"""What a running search tells whoever shows it; `run_study(on_event=...)` gets these in order, from one thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunesearch.evaluate.task import Evaluation, Split
from prunesearch.record import Record
from prunesearch.search.confirm import Confirmed
from prunesearch.search.shared_weights import SupernetTrained

Reason = Literal["trials", "hours", "exhausted", "hopeless", "disk", "interrupted", "cancelled"]
"""trials, hours: the bound of `stop` was reached. exhausted: there is no further candidate within the limits.
hopeless: the first ones all failed; `run_study` raises RunError once the running ones are back. disk: a worker could
not write its weights; what it evaluated runs again next time.
interrupted: asked to stop, running candidates were waited for. cancelled: asked twice, they were not."""


@dataclass(frozen=True)
class Checked:
    """The study file has no mistakes. PyTorch is loaded now, data and weights are opened, and workers start."""


@dataclass(frozen=True)
class LookingAtData:
    """Before workers start, pictures are opened: so many of a split so far. Comes every few seconds; total: None for a
    stream."""

    split: Split
    done: int
    total: int | None


@dataclass(frozen=True)
class Started:
    """The study is open and workers are ready.

    records: what the study holds, running ones included. total: of `stop.trials`. done: finished candidates.
    recovered: finished before, but only now put into the study. rerun: begun before and not finished.
    workers: for people, such as "2 Ray workers, 1 CPU each".
    """

    records: tuple[Record, ...]
    total: int | None
    done: int
    rerun: int
    recovered: int
    workers: str


@dataclass(frozen=True)
class Submitted:
    """A candidate went to a worker, for the budget of `record.rung`; attempt 0 is the first time at that rung."""

    record: Record
    attempt: int


@dataclass(frozen=True)
class Finished:
    """An evaluation is in the storage; its candidate is complete, failed, or paused at a lower rung. rejected:
    proposals of this run that arithmetic or identity turned down so far."""

    record: Record
    evaluation: Evaluation
    rejected: int


@dataclass(frozen=True)
class Retrying:
    """A worker died; its candidate will be tried again."""

    record: Record
    attempt: int
    why: str


@dataclass(frozen=True)
class Waiting:
    """The storage is away or full; the search waits for it, for `waited` seconds so far. Workers go on."""

    why: str
    waited: float


@dataclass(frozen=True)
class Stopping:
    """No further candidates are submitted; `running` are waited for. `why` is for people."""

    reason: Reason
    running: int
    why: str


@dataclass(frozen=True)
class Done:
    """The run is over and everything is saved. Counts are of the whole study, `rejected` and `seconds` of this run."""

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
    | Submitted
    | Finished
    | Retrying
    | Waiting
    | Stopping
    | Confirmed
    | Done
)
