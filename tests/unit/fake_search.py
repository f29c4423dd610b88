"""A study that evaluates in microseconds: the real space, sampler, storage and loop around made-up numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prunesearch.config import (
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

FAKE = "fake_search:evaluate"
SPACE = SpaceConfig(
    blocks=(1, 2, 3, 4, 5),
    keep=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    score=("class_attention", "key_norm"),
    reduce=("drop", "fuse", "merge"),
)


def study(trials: int | None = 12, sampler: str = "random", seed: int = 0, **changes: Any) -> StudyConfig:
    """A study of the digits model in this process."""
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


def evaluate(task: Task) -> Evaluation:
    """Later stages hurt less, and cost is the real one."""
    cost = estimate_cost(model_shape(task.model), task.schedule)
    damage = sum((1.0 - (stage.keep or 1.0)) / (1 + stage.block) for stage in task.schedule.stages)
    metrics = {"top1": 100 * (1 - damage), "gmacs": cost.gmacs}
    return Evaluation(task.uid, "complete", task.rung, task.attempt, metrics=tuple(metrics.items()), tokens=cost.tokens)


def evaluate_in_vain(task: Task) -> Evaluation:
    """Nothing works."""
    return Evaluation(task.uid, "failed", cause="error", error="no such luck", traceback="Traceback ...")
