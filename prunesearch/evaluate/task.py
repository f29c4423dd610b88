"""`Task`, which goes to a worker, and `Evaluation`, which comes back.

Both hold names and numbers only. They can be pickled, and converted to JSON and back (`strict.to_mapping`,
`strict.from_mapping`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from prunesearch.config import (
    LARGEST,
    Budget,
    DataConfig,
    FinetuneConfig,
    MeasureConfig,
    ModelConfig,
    Options,
    Precision,
    RuntimeName,
    SpaceConfig,
    Target,
    bounded,
)
from prunesearch.evaluate.limits import AbsoluteLimit
from prunesearch.printable import counted
from prunesearch.profile import MOST_MS, Profile
from prunesearch.schedule import Schedule

Split = Literal["train", "validation", "test"]
Status = Literal["complete", "failed"]
Cause = Literal["error", "oom", "nan", "timeout", "crash", "invalid", "disk"]
"""error: an exception; oom: out of memory; nan: the loss or a metric was not finite; timeout: hung;
crash: the worker or its node died; invalid: the schedule does not fit the model; disk: no space to write weights, which
is not the candidate's fault and does not count against it."""


@dataclass(frozen=True)
class SupernetWork:
    """What training shared weights needs besides a model, images and `Task.finetune`.

    space, limits: schedules are drawn from this space, within the limits on computed metrics. schedules: number of
    random ones in each step. images: training images in total; `Task.budget` says how far this task trains.
    """

    space: SpaceConfig
    schedules: int
    images: int
    limits: tuple[tuple[str, AbsoluteLimit], ...] = ()


@dataclass(frozen=True)
class ToTime:
    """A schedule to be timed. name: of its result.

    weights, start: as in `Task`. They matter with thresholds only, where they decide how many tokens an image keeps.
    """

    name: str
    schedule: Schedule
    weights: str | None = None
    start: str | None = None


@dataclass(frozen=True)
class TimingWork:
    """Schedules to be timed whole, in turns with the dense model; see `device.whole_models`.

    seconds: of measuring. batch: images in a batch. precision: as in a profile; None: as in an evaluation, with mixed
    precision if `Task.finetune` says so. Threads are those of the task; all cores when it gives none.
    """

    schedules: tuple[ToTime, ...]
    seconds: float
    batch: int
    runtime: RuntimeName = "torch"
    precision: Precision | None = None


def timing_work(
    schedules: tuple[ToTime, ...], seconds: float, measure: MeasureConfig, profile: Profile | None
) -> TimingWork:
    """How schedules are timed: as the profile was measured; without one in eager PyTorch, as throughput is."""
    if profile is None:
        return TimingWork(schedules, seconds, measure.speed_batch_size)
    runtime, precision = cast("RuntimeName", profile.runtime), cast("Precision", profile.precision)
    return TimingWork(schedules, seconds, profile.batch, runtime, precision)


@dataclass(frozen=True)
class Conditions:
    """Where and how schedules were timed, for people. threads: 0 on a GPU. rounds: how often each was measured.

    profiled: the device of the profile, if it is another one.
    """

    runtime: str
    batch: int
    device: str
    threads: int
    precision: str
    rounds: int
    profiled: str = ""

    def __str__(self) -> str:
        threads = f", {counted(self.threads, 'thread')}" if self.threads else ""
        return f"batch {self.batch} in {self.runtime} on {self.device}{threads}, {self.precision}, {self.rounds} rounds"


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the dense model a schedule is, measured in turns with it.

    name: as in `ToTime`; "" for the dense model. ratio, low, high: median and quartiles over rounds. ms: of a batch,
    median. predicted: the ratio that the profile gives; None without one. problem: why it was not timed; then there are
    no numbers.
    """

    name: str
    ratio: float | None = bounded("times as fast", None, above=0, high=LARGEST)
    low: float | None = bounded("its first quartile", None, above=0, high=LARGEST)
    high: float | None = bounded("its third quartile", None, above=0, high=LARGEST)
    ms: float | None = bounded("milliseconds of a batch", None, above=0, high=MOST_MS)
    dense_ms: float | None = bounded("those of the dense model", None, above=0, high=MOST_MS)
    predicted: float | None = bounded("times as fast, by the profile", None, above=0, high=LARGEST)
    conditions: Conditions | None = None
    problem: str = ""


@dataclass(frozen=True)
class Task:
    """Everything that one evaluation needs. Equal tasks give equal numbers on the same machine.

    uid: identity of the configuration (hash of its canonical schedule within the study).
    weights: safetensors file of the model with this schedule, as exported. It replaces the model's own weights.
    start: safetensors file of dense weights to start from instead of the model's own. `agreement` and distillation
    still compare with the original model.
    timing: time these schedules and evaluate nothing.
    supernet: train shared weights and evaluate nothing. Finished weights go to `<save_to>.safetensors`, unfinished ones
    with their progress to `<save_to>.state`.
    rung, attempt: index of the budget among the study's rungs, and how often this task was tried before.
    metrics: names of registered metrics to report. seed: for training order and new weights.
    split: the images that metrics are measured on.
    confirms: uid of the candidate that this task measures again with a fresh seed; None for a task of the search.
    sibling: another dense model, which is measured instead of `model`. `agreement` still compares with `model`.
    parameters: the sampler's values, when the schedule does not show them.
    profile: of the device that the model is for.
    device: "auto", "cpu", "cuda", "mps". threads: PyTorch's CPU threads; None does not change them.
    resume_from: checkpoint (.safetensors + .state) of a smaller budget to continue from.
    save_to: path without suffix. Fine-tuned weights go to `<save_to>.safetensors`, and progress with the optimiser's
    state, from which a larger budget can continue, to `<save_to>.state`. Nothing is written when it is None or the
    budget is 0 images.
    """

    uid: str
    model: ModelConfig
    data: DataConfig
    schedule: Schedule
    budget: Budget
    metrics: tuple[str, ...] = ()
    finetune: FinetuneConfig = FinetuneConfig()
    measure: MeasureConfig = MeasureConfig()
    rung: int = 0
    attempt: int = 0
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    resume_from: str | None = None
    save_to: str | None = None
    weights: str | None = None
    start: str | None = None
    supernet: SupernetWork | None = None
    split: Literal["validation", "test"] = "validation"
    confirms: str | None = None
    sibling: ModelConfig | None = None
    parameters: Options = ()
    plugins: tuple[str, ...] = ()
    profile: Profile | None = None
    timing: TimingWork | None = None

    @property
    def target(self) -> Target:
        """What costs are computed for."""
        return Target(self.model, self.profile)


@dataclass(frozen=True)
class Evaluation:
    """Result of a task. A failed evaluation has a cause, an error (for exceptions a traceback too), and the metrics
    that were finished.

    metrics: name -> value, in the metric's unit. spread: name -> spread of a measured metric (half the
    interquartile range, same unit). tokens: patch + prefix tokens after each block, with thresholds the rounded mean
    over the validation images. images: training images seen. seconds: wall time by phase ("load", "train",
    "calibrate", "measure"). versions: of python, torch, timm, prunesearch, and "data": counts and hashes.
    checkpoint: path without suffix of the weights that were written, or None. start: as in the task. schedule: the
    schedule with its learned thresholds; None without thresholds. data_notes: messages about images left out.
    speeds: of `Task.timing`.
    """

    uid: str
    status: Status
    rung: int = 0
    attempt: int = 0
    cause: Cause | None = None
    error: str = ""
    traceback: str = ""
    metrics: tuple[tuple[str, float], ...] = ()
    spread: tuple[tuple[str, float], ...] = ()
    tokens: tuple[int, ...] = ()
    images: int = 0
    seconds: tuple[tuple[str, float], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    host: str = ""
    device: str = ""
    checkpoint: str | None = None
    start: str | None = None
    schedule: Schedule | None = None
    data_notes: tuple[str, ...] = ()
    speeds: tuple[Speed, ...] = ()

    def value(self, metric: str) -> float:
        """The value of one metric; KeyError when it was not measured."""
        return dict(self.metrics)[metric]
