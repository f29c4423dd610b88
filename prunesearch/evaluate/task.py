"""The two values that cross the wire: a `Task` goes to a worker, an `Evaluation` comes back.

Both hold names and numbers only, pickle, and round-trip through JSON (`files.to_mapping`, `files.from_mapping`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunesearch.config import (
    Budget,
    DataConfig,
    FinetuneConfig,
    Limit,
    MeasureConfig,
    ModelConfig,
    Options,
    SpaceConfig,
)
from prunesearch.schedule import Schedule

Split = Literal["train", "validation", "test"]
Status = Literal["complete", "failed"]
Cause = Literal["error", "oom", "nan", "timeout", "crash", "invalid", "disk"]
"""error: an exception; oom: out of memory; nan: the loss was not finite; timeout: hung;
crash: the worker or its node died; invalid: the schedule does not fit the model; disk: no space for weights, which is
no fault of the candidate and is not held against it."""


@dataclass(frozen=True)
class SupernetWork:
    """What training shared weights needs beside a model, images and `Task.finetune`.

    space, limits: which schedules are drawn, and which of them arithmetic turns down. schedules: so many random ones in
    each step. images: training images in all; `Task.budget` says how far this task takes it.
    """

    space: SpaceConfig
    schedules: int
    images: int
    limits: tuple[tuple[str, Limit], ...] = ()


@dataclass(frozen=True)
class Task:
    """Everything one evaluation needs, by name. Equal tasks give equal numbers on the same machine.

    uid: identity of the configuration (hash of its canonical schedule within the study).
    weights: safetensors file of the model with this schedule, as exported, instead of the model's own weights.
    start: safetensors file of the dense model's weights to begin with instead of its own. The model that `agreement`
    and distillation compare with stays the original one.
    supernet: train shared weights, and evaluate nothing. They go to `<save_to>.safetensors` when they are finished,
    until then with what continuing needs to `<save_to>.state`.
    rung, attempt: which budget of the study's rungs this is, and how often it was tried before.
    metrics: names of registered metrics to report. seed: of training order and of fresh weights.
    split: the images that metrics are measured on.
    confirms: uid of the candidate that this task measures again with a fresh seed, None for a task of the search.
    parameters: what the sampler drew, where the schedule does not say it.
    device: "auto", "cpu", "cuda", "mps". threads: torch threads on the CPU, None leaves them alone.
    resume_from: checkpoint (.safetensors + .state) of an earlier budget to continue from.
    save_to: path without suffix; the fine-tuned weights go to `<save_to>.safetensors`, the optimiser state,
    which lets a later budget continue, to `<save_to>.state`. Nothing is written when it is None or when the
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
    parameters: Options = ()
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What came back. A failed evaluation has a cause and a traceback, and whatever metrics were finished.

    metrics: name -> value, in the metric's unit. spread: name -> spread of a measured metric (half the
    interquartile range, same unit). tokens: patch + prefix tokens after each block, with thresholds the rounded mean
    over the validation images. images: training images seen. seconds: wall time by phase ("load", "train",
    "calibrate", "measure"). versions: of python, torch, timm, prunesearch, and "data": counts and hashes.
    checkpoint: path without suffix of the weights that were written, or None. start: as in the task. schedule: with the
    thresholds that were learned, None for fixed counts. data_notes: which pictures and files were left out, for people.
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

    def value(self, metric: str) -> float:
        """The value of one metric; KeyError when it was not measured."""
        return dict(self.metrics)[metric]
