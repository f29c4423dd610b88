"""A study with made-up evaluations that take microseconds. Space, sampler, storage and loop are real."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunesearch.config import (
    Budget,
    ModelConfig,
    Objective,
    SamplerConfig,
    SpaceConfig,
    StopConfig,
    StudyConfig,
    WorkersConfig,
)
from prunesearch.cost import estimate_cost
from prunesearch.evaluate import model_shape
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.record import Record
from prunesearch.search.driver import run_study
from prunesearch.search.events import Checked, Done, Event, Finished
from prunesearch.shape import ModelShape
from prunesearch.study.reader import open_study_readonly

SPACE = SpaceConfig(
    blocks=(1, 2, 3, 4, 5),
    keep=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    score=("class_attention", "key_norm"),
    reduce=("drop", "fuse", "merge"),
)
SHAPE = ModelShape(
    depth=8,
    dim=48,
    heads=3,
    attention_dim=48,
    patch_tokens=64,
    prefix_tokens=1,
    class_tokens=1,
    mlp_macs=9216,
    stem_macs=3072,
    head_macs=480,
)
EVALUATED: list[str] = []
"""Uids in the order they were evaluated in this process; tests clear it."""


def study(trials: int | None = 12, sampler: str = "random", seed: int = 0, **changes: Any) -> StudyConfig:
    """A study of the digits model with a worker in this process."""
    config = StudyConfig(
        version=1,
        name="fake",
        model=ModelConfig("vit_digits_patch1_8"),
        space=SPACE,
        objectives=(Objective("top1", "maximize"), Objective("gmacs", "minimize")),
        sampler=SamplerConfig(sampler, seed),
        workers=WorkersConfig(kind="serial"),
        stop=StopConfig(trials=trials),
    )
    return replace(config, **changes)


RUNGS = (Budget(images=0), Budget(images=640), Budget(images=2560))


def small_study(trials: int, sampler: str = "tpe", **changes: Any) -> StudyConfig:
    """A study with three rungs and so few parameters that the sampler soon learns from a higher rung."""
    space = SpaceConfig(blocks=(1, 2, 4), keep=SPACE.keep)
    config = study(trials, sampler, space=space, rungs=RUNGS, promote=2)
    return replace(config, sampler=replace(config.sampler, startup=3), **changes)


def evaluate(task: Task) -> Evaluation:
    """Made-up accuracy: later stages hurt less, training repairs some damage, depending on the schedule. Real cost."""
    EVALUATED.append(task.uid)
    cost = estimate_cost(model_shape(task.model), task.schedule)
    damage = sum((1.0 - (stage.keep or 1.0)) / (1 + stage.block) for stage in task.schedule.stages)
    mended = task.rung * (0.1 + int(task.uid, 16) % 7 / 50)
    metrics = {"gmacs": cost.gmacs, "top1": 100 * (1 - damage * (1 - mended))}
    if task.save_to is not None:
        Path(f"{task.save_to}.state").parent.mkdir(exist_ok=True)
        Path(f"{task.save_to}.state").touch()
    return Evaluation(
        task.uid,
        "complete",
        task.rung,
        task.attempt,
        metrics=tuple(metrics.items()),
        tokens=cost.tokens,
        images=task.budget.images or 0,
        host=str(os.getpid()),
        checkpoint=task.save_to,
    )


def evaluate_and_note(task: Task) -> Evaluation:
    """`evaluate` that also appends a line to the file in FAKE_LEDGER, for other processes."""
    with Path(os.environ["FAKE_LEDGER"]).open("a") as ledger:
        ledger.write(f"{task.uid}\n")
    return evaluate(task)


def evaluate_in_vain(task: Task) -> Evaluation:
    """Always fail."""
    return Evaluation(task.uid, "failed", cause="error", error="no such luck", traceback="Traceback: ...")


def evaluate_without_memory(task: Task) -> Evaluation:
    """Always fail with out of memory."""
    return Evaluation(task.uid, "failed", cause="oom", error="too large", traceback="Traceback: ...")


def evaluate_to_infinity(task: Task) -> Evaluation:
    """Every third result has an infinite top1."""
    evaluation = evaluate(task)
    if len(EVALUATED) % 3:
        return evaluation
    return replace(evaluation, metrics=(("top1", float("inf")), ("gmacs", 1.0)))


def run(
    config: StudyConfig, folder: Path, evaluate: str = "evaluate", journal: bool = True
) -> tuple[Done, list[Event]]:
    """Run a study with a function of this module. Uses a journal file, which is faster than SQLite."""
    events: list[Event] = []
    storage = f"journal:{folder / 'study.log'}" if journal else None
    done = run_study(config, folder, storage=storage, on_event=events.append, evaluate=f"fake_search:{evaluate}")
    assert isinstance(events[0], Checked)
    return done, events[1:]


def records(folder: Path) -> list[Record]:
    """The records in the journal of `run`."""
    reader = open_study_readonly(storage=f"journal:{folder / 'study.log'}")
    try:
        return reader.records()
    finally:
        reader.close()


def finished(events: list[Event]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]
