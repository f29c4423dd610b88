"""Find the model and data for a command: from a schedule file or study, with values of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunesearch.config import DataConfig, ModelConfig, StudyConfig
from prunesearch.errors import UserError
from prunesearch.files import ScheduleFile, from_mapping, override, to_mapping
from prunesearch.yaml_text import Text

NORMALISATION = ("mean", "std", "interpolation", "crop_pct")
"""Fields of a data section that change every pixel. Absent ones are taken from the model's configuration."""


@dataclass(frozen=True)
class Given:
    """Values of the command line; None and () mean not given.

    model, data: names. overrides: such as "data.mean=[0.5]", with the value as in YAML.
    """

    model: str | None = None
    data: str | None = None
    root: str | None = None
    val_root: str | None = None
    overrides: tuple[str, ...] = ()


def model_and_data(
    file: ScheduleFile, study: StudyConfig | None = None, given: Given | None = None
) -> tuple[ModelConfig | None, DataConfig | None]:
    """The model and data sections of the study, else of the file, with the given values replaced; None if unknown.

    A given name that differs from the section's starts a new section (a pretrained model, or default data settings),
    because settings of one model or data set do not apply to another. Raises UserError for values without a name,
    FileError for unknown fields.
    """
    given = given or Given()
    sections = _sections(file, study)
    known = set(sections)
    if given.model is not None and given.model != sections.get("model", {}).get("name"):
        sections["model"] = {"name": given.model, "pretrained": True}
    if given.data is not None and given.data != sections.get("data", {}).get("name"):
        sections["data"] = {"name": given.data}
    for one in given.overrides:
        if one.split(".")[0] not in ("model", "data") or "." not in one.split("=")[0]:
            raise UserError(f"--set {one}: possible: model.FIELD=VALUE and data.FIELD=VALUE. Name one of those fields.")
        override(Text(sections), one)
    roots = {"root": given.root, "val_root": given.val_root}
    for field, path in roots.items():
        if path is not None:
            sections.setdefault("data", {})[field] = path
    for name, section in sections.items():
        if name not in known and "name" not in section:
            raise UserError(
                f"{name}: values were given for it, but no name, and the schedule file names none. Possible: "
                f"--study FOLDER, or --{name} NAME. Give one of them."
            )
    place = "schedule file" if given == Given() else "schedule file, with the values of the command line"
    model, data = sections.get("model"), sections.get("data")
    return (
        None if model is None else from_mapping(ModelConfig, model, place),
        None if data is None else from_mapping(DataConfig, data, place),
    )


def needed(model: ModelConfig | None, data: DataConfig | None) -> tuple[ModelConfig, DataConfig]:
    """Return both. Raises UserError when one is None."""
    if model is None or data is None:
        missing = "model" if model is None else "data"
        raise UserError(
            f"schedule file: it names no {missing}. Possible: --study FOLDER, or --{missing} NAME. Give one of them."
        )
    return model, data


def guessed_normalisation(
    before: tuple[ModelConfig | None, DataConfig | None], now: tuple[ModelConfig, DataConfig]
) -> list[str]:
    """Notes for normalisation values that come from the model and differ from those the schedule was measured with.

    before: model and data of the study or file. now: those that are used. Raises DataError and ModelError.
    """
    if before == now or before[0] is None or before[1] is None:
        return []
    from prunesearch.evaluate.inputs import image_input_of

    measured, guessed = image_input_of(before[0], before[1]), image_input_of(*now)
    return [
        f"data.{name} is {_shown(guessed, name)}, the model's own, but the schedule was measured with "
        f"{_shown(measured, name)}. Give --set data.{name}=VALUE if that is not what these images want."
        for name in NORMALISATION
        if getattr(now[1], name) is None and _shown(guessed, name) != _shown(measured, name)
    ]


def _sections(file: ScheduleFile, study: StudyConfig | None) -> dict[str, Any]:
    if study is not None:
        return {"model": to_mapping(study.model), "data": {"name": study.data.name, **to_mapping(study.data)}}
    model = {} if file.model is None else {"model": dict(file.model)}
    return model if file.data is None else {**model, "data": {"name": DataConfig.name, **file.data}}


def _shown(images: object, name: str) -> str:
    value = getattr(images, name)
    return f"[{', '.join(f'{number:g}' for number in value)}]" if isinstance(value, tuple) else str(value)
