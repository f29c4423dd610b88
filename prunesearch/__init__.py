"""prunesearch: search token-pruning schedules for Vision Transformers.

    from prunesearch import apply_schedule, load_schedule

    model = timm.create_model("deit_small_patch16_224", pretrained=True)
    apply_schedule(model, load_schedule("best.yaml"))

The names below are imported when they are first used, so that `import prunesearch` is instant and needs neither Ray
nor Optuna nor rich.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunesearch.config import StudyConfig as StudyConfig
    from prunesearch.cost import estimate_cost as estimate_cost
    from prunesearch.errors import PruneSearchError as PruneSearchError
    from prunesearch.evaluate import Evaluation as Evaluation
    from prunesearch.evaluate import Task as Task
    from prunesearch.files import load_schedule as load_schedule
    from prunesearch.files import load_study as load_study
    from prunesearch.files import save_schedule as save_schedule
    from prunesearch.models import apply_schedule as apply_schedule
    from prunesearch.models import remove_schedule as remove_schedule
    from prunesearch.models import shape_of as shape_of
    from prunesearch.schedule import Schedule as Schedule
    from prunesearch.schedule import Stage as Stage

__version__ = "0.1.0"

_HOMES = {
    "Evaluation": "evaluate",
    "PruneSearchError": "errors",
    "Schedule": "schedule",
    "Stage": "schedule",
    "StudyConfig": "config",
    "Task": "evaluate",
    "apply_schedule": "models",
    "estimate_cost": "cost",
    "load_schedule": "files",
    "load_study": "files",
    "remove_schedule": "models",
    "save_schedule": "files",
    "shape_of": "models",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
