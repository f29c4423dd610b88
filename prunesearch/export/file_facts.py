"""What an exported file says of itself: model, preprocessing, classes, schedule, cost and versions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from prunesearch.config import DataConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import FileError
from prunesearch.evaluate.images import ImageInput, image_input
from prunesearch.evaluate.machine import versions
from prunesearch.export.runtimes import as_metadata, check_readable, runtime_of
from prunesearch.files import schedule_text
from prunesearch.models import schedule_of, shape_of
from prunesearch.schedule import Schedule
from prunesearch.strict import from_mapping, to_mapping


@dataclass(frozen=True)
class FileFacts:
    """What an exported file says of itself.

    model: its name. preprocessing: how pictures become input. schedule: the text of a schedule file, without stages
    for a dense model. gmacs, dense_gmacs: 10^9 multiply-accumulates of an image, with and without the schedule.
    tokens: after each block, prefix included. half: weights and activations are fp16. classes: their names in the order
    of the outputs; empty when unknown. versions: of the libraries that wrote the file. features: the model has no
    classifier, and its output are features. segments: its output are logits of patches, (batch, classes, rows,
    columns).
    """

    model: str
    preprocessing: ImageInput
    schedule: str
    gmacs: float
    dense_gmacs: float
    tokens: tuple[int, ...]
    half: bool
    classes: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    features: bool = False
    segments: bool = False


def facts_of(
    model: nn.Module, *, name: str | None, data: DataConfig | None, classes: tuple[str, ...], half: bool
) -> FileFacts:
    """The facts of a model with or without a schedule. Raises ModelError and DataError.

    name: of the model; timm's when None. data: its mean, std, interpolation and crop_pct replace the model's own.
    """
    shape, schedule = shape_of(model), schedule_of(model) or Schedule()
    cost = estimate_cost(shape, schedule)
    return FileFacts(
        model=name or _timm_name(model),
        preprocessing=image_input(model, data or DataConfig()),
        schedule=schedule_text(schedule, "schedule.yaml"),
        gmacs=cost.gmacs,
        dense_gmacs=estimate_cost(shape).gmacs,
        tokens=cost.tokens,
        half=half,
        classes=classes,
        versions=tuple(sorted(versions())),
        features=shape.gives_features,
        segments=shape.segments,
    )


def written(facts: FileFacts) -> dict[str, str]:
    """The facts as the metadata of a file."""
    return as_metadata(to_mapping(facts, defaults=True))


def read_facts(path: str | Path) -> FileFacts:
    """Read what an .onnx or .xml file that prunesearch exported says of itself.

    Nothing of the file is run. Raises UserError for another suffix, FileError for a file that cannot be read or that
    something else wrote.
    """
    path = Path(path)
    runtime = runtime_of(path)
    check_readable(runtime, path)
    found = {}
    for key, value in runtime.read(path).items():
        room, _, name = key.partition(".")
        if room == "prunesearch":
            found[name] = value if name in ("model", "schedule") else _json(value)
    if not found:
        raise FileError(str(path), ["it has no metadata of prunesearch. Give a file that prunesearch exported."])
    return from_mapping(FileFacts, found, str(path))


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text  # of the wrong kind, which is reported for its field


def _timm_name(model: nn.Module) -> str:
    settings = getattr(model, "pretrained_cfg", None) or {}
    parts = [settings.get("architecture"), settings.get("tag")]
    return ".".join(part for part in parts if part) or type(model).__name__
