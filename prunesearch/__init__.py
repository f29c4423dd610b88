"""prunesearch: search token-pruning schedules for Vision Transformers.

    from prunesearch import apply_schedule

    model = timm.create_model("deit_small_patch16_224", pretrained=True)
    apply_schedule(model, "best.yaml")

The names below are imported when they are first used. So `import prunesearch` is fast, and loads neither PyTorch nor
Ray nor Optuna.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from prunesearch.moved import Signpost
from prunesearch.registry import lazily

if TYPE_CHECKING:
    from prunesearch.config import StudyConfig as StudyConfig
    from prunesearch.cost import estimate_cost as estimate_cost
    from prunesearch.errors import PruneSearchError as PruneSearchError
    from prunesearch.evaluate import Evaluation as Evaluation
    from prunesearch.evaluate import Task as Task
    from prunesearch.export import export_onnx as export_onnx
    from prunesearch.export import export_openvino as export_openvino
    from prunesearch.files import load_schedule as load_schedule
    from prunesearch.files import load_study as load_study
    from prunesearch.files import save_schedule as save_schedule
    from prunesearch.models import apply_schedule as apply_schedule
    from prunesearch.models import remove_schedule as remove_schedule
    from prunesearch.models import shape_of as shape_of
    from prunesearch.models import with_dense_head as with_dense_head
    from prunesearch.schedule import Schedule as Schedule
    from prunesearch.schedule import Stage as Stage

__version__ = "0.1.0"

_HOMES = {
    "Evaluation": "prunesearch.evaluate",
    "PruneSearchError": "prunesearch.errors",
    "Schedule": "prunesearch.schedule",
    "Stage": "prunesearch.schedule",
    "StudyConfig": "prunesearch.config",
    "Task": "prunesearch.evaluate",
    "apply_schedule": "prunesearch.models",
    "estimate_cost": "prunesearch.cost",
    "export_onnx": "prunesearch.export",
    "export_openvino": "prunesearch.export",
    "load_schedule": "prunesearch.files",
    "load_study": "prunesearch.files",
    "remove_schedule": "prunesearch.models",
    "save_schedule": "prunesearch.files",
    "shape_of": "prunesearch.models",
    "with_dense_head": "prunesearch.models",
}
__all__ = ["__version__", *_HOMES]
__getattr__ = lazily(__name__, _HOMES)

sys.meta_path.append(Signpost())


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
