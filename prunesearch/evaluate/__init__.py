"""From a `Task` to an `Evaluation`: data, fine-tune, metrics. The only code that runs on a worker."""

from __future__ import annotations

from prunesearch.config import DataConfig, ModelConfig
from prunesearch.evaluate.build import (
    build_model,
    check_checkpoint,
    is_remote,
    model_problems,
    model_shape,
    skeleton,
)
from prunesearch.evaluate.data import DATASETS, check_paths
from prunesearch.evaluate.images import ImageInput, image_input
from prunesearch.evaluate.inputs import Inputs, check_inputs
from prunesearch.evaluate.metrics import METRICS, Measured, Metric, Subject, computed_metric, measured_metric
from prunesearch.evaluate.run import evaluate
from prunesearch.evaluate.task import Evaluation, Task

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


def image_input_of(model: ModelConfig, data: DataConfig) -> ImageInput:
    """How images are resized, cropped and normalised for a model, without its weights. Raises DataError, ModelError."""
    return image_input(skeleton(model), data)


def check_files(model: ModelConfig, data: DataConfig) -> None:
    """Raises ModelError or DataError when what a study reads is not there; a look at the paths, nothing is opened."""
    if model.checkpoint is not None:
        check_checkpoint(model.checkpoint)
    check_paths(data)
