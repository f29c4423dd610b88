"""From a `Task` to an `Evaluation`: data, fine-tune, metrics. The only code that runs on a worker."""

from __future__ import annotations

from prunesearch.evaluate.build import build_model, model_shape
from prunesearch.evaluate.data import DATASETS
from prunesearch.evaluate.metrics import METRICS, Measured, Metric, Subject, computed_metric, measured_metric
from prunesearch.evaluate.run import evaluate
from prunesearch.evaluate.task import Evaluation, Task

__all__ = [
    "DATASETS",
    "METRICS",
    "Evaluation",
    "Measured",
    "Metric",
    "Subject",
    "Task",
    "build_model",
    "computed_metric",
    "evaluate",
    "measured_metric",
    "model_shape",
]
