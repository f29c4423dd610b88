"""Published schedules by name. Each is a YAML file in this folder with rules, which `rule.py` fits to a model."""

from __future__ import annotations

from functools import cache

from prunesearch.errors import UnknownNameError
from prunesearch.files import PRESETS, PresetFile, load_preset_file, load_schedule_file, preset_names
from prunesearch.presets.rule import fit
from prunesearch.registry import did_you_mean
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape


@cache
def presets() -> dict[str, PresetFile]:
    """Every preset by name, in alphabetical order."""
    return {name: load_preset_file(PRESETS / f"{name}.yaml") for name in preset_names()}


def load_preset(name: str, shape: ModelShape) -> Schedule:
    """A published schedule fitted to a model. Raises UnknownNameError, or ScheduleError when it cannot fit."""
    if name not in presets():
        known = ", ".join(presets())
        raise UnknownNameError(f"unknown preset {name!r}. Known: {known}.{did_you_mean(name, presets())}")
    return fit(name, presets()[name], shape)


def find_schedule(name_or_path: str, shape: ModelShape) -> Schedule:
    """A schedule from a YAML file (a name that ends in .yaml or .yml), else from the preset of that name.

    Raises UnknownNameError, FileError or ScheduleError.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return load_schedule_file(name_or_path).schedule
    return load_preset(name_or_path, shape)
