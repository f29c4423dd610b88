"""From a `Task` to an `Evaluation`: data, fine-tune, metrics. The only code that runs on a worker.

Names that need no PyTorch are imported here at once: tasks, the table of metrics, shapes by model name, checks of the
model section. The other names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunesearch.evaluate.metrics import METRICS, Measured, Metric, computed_metric, measured_metric
from prunesearch.evaluate.sections import is_remote, model_problems
from prunesearch.evaluate.shapes import model_shape
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.registry import lazily

if TYPE_CHECKING:
    from prunesearch.evaluate.build import build_model
    from prunesearch.evaluate.data import DATASETS
    from prunesearch.evaluate.inputs import Inputs, check_files, check_inputs, image_input_of
    from prunesearch.evaluate.measures import Subject
    from prunesearch.evaluate.run import evaluate

__all__ = [
    "DATASETS",
    "METRICS",
    "Evaluation",
    "Inputs",
    "Measured",
    "Metric",
    "Subject",
    "Task",
    "build_model",
    "check_files",
    "check_inputs",
    "computed_metric",
    "evaluate",
    "image_input_of",
    "is_remote",
    "measured_metric",
    "model_problems",
    "model_shape",
]
__getattr__ = lazily(
    __name__,
    {
        "DATASETS": "prunesearch.evaluate.data",
        "Inputs": "prunesearch.evaluate.inputs",
        "Subject": "prunesearch.evaluate.measures",
        "build_model": "prunesearch.evaluate.build",
        "check_files": "prunesearch.evaluate.inputs",
        "check_inputs": "prunesearch.evaluate.inputs",
        "evaluate": "prunesearch.evaluate.run",
        "image_input_of": "prunesearch.evaluate.inputs",
    },
)
