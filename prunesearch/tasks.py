"""What `task` in a study file stands for: fields that suit a task. Those that the file writes win."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

TaskName = Literal["classification", "features", "segmentation"]


def _objectives(metric: str) -> list[dict[str, str]]:
    return [{"metric": metric, "goal": "maximize"}, {"metric": "gmacs", "goal": "minimize"}]


TASKS: Mapping[str, Mapping[str, Any]] = {
    "classification": {},
    "features": {
        "model": {"num_classes": 0},
        "objectives": _objectives("feature_similarity"),
        "finetune": {"distill_weight": 1.0},
    },
    "segmentation": {"space": {"until": ["next", "end"]}, "objectives": _objectives("miou")},
}


def expanded(study: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the task of a study, as read from a file, by the fields it stands for.

    Fields of the study win. For segmentation a model with a number of classes gets a linear head; a model without one
    brings its own. An unknown task, and sections that are no mappings, stay as they are, and the reader reports them.
    """
    task = study.get("task")
    suits = TASKS.get(task) if isinstance(task, str) else None
    if suits is None:
        return dict(study)
    found = {name: value for name, value in study.items() if name != "task"}
    for name, value in suits.items():
        if name not in found:
            found[name] = value
        elif isinstance(value, Mapping) and isinstance(found[name], Mapping):
            found[name] = {**value, **found[name]}
    model = found.get("model")
    if task == "segmentation" and isinstance(model, Mapping) and "num_classes" in model:
        found["model"] = {"head": "linear", **model}
    return found
