"""An evaluation for Ray Tune: immediate made-up numbers, and checkpoints that record their history."""

from __future__ import annotations

import os
from pathlib import Path

from prunesearch.cost import estimate_cost
from prunesearch.evaluate import model_shape
from prunesearch.evaluate.task import Evaluation, Task


def evaluate(task: Task) -> Evaluation:
    """Training helps; a rung above 0 needs the checkpoint of the one below. Every 5th uid fails at rung 1."""
    below = "" if task.resume_from is None else Path(f"{task.resume_from}.state").read_text()
    assert bool(below) == (task.rung > 0), "no checkpoint of the rung below"
    assert task.save_to is not None
    Path(task.save_to).parent.mkdir(exist_ok=True)
    Path(f"{task.save_to}.state").write_text(f"{below}{task.rung}")
    Path(f"{task.save_to}.safetensors").write_text(f"weights of {task.uid} at rung {task.rung}")
    fails = task.rung == 1 and int(task.uid, 16) % 5 == 0
    gmacs = estimate_cost(model_shape(task.model), task.schedule).gmacs
    metrics = (("gmacs", gmacs), ("top1", 90.0 - int(task.uid, 16) % 50 + task.rung))
    return Evaluation(
        task.uid,
        "failed" if fails else "complete",
        task.rung,
        cause="oom" if fails else None,
        error="too large" if fails else "",
        metrics=() if fails else metrics,
        images=task.budget.images or 0,
        checkpoint=None if fails else task.save_to,
        host=f"{os.getpid()} {os.getcwd()}",
    )
