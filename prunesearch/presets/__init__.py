"""Published schedules by name. Each is a YAML file in this folder: a rule that fits any depth and image size."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from prunesearch.errors import ScheduleError, UnknownNameError
from prunesearch.files import PresetFile, load_preset_file, load_schedule
from prunesearch.registry import did_you_mean
from prunesearch.schedule import ModelShape, Schedule, Stage

FOLDER = Path(__file__).parent


@cache
def presets() -> dict[str, PresetFile]:
    """Every preset by name, in alphabetical order."""
    return {path.stem: load_preset_file(path) for path in sorted(FOLDER.glob("*.yaml"))}


def load_preset(name: str, shape: ModelShape) -> Schedule:
    """A published schedule fitted to a model. Raises UnknownNameError; ScheduleError when its rule cannot fit."""
    if name not in presets():
        known = ", ".join(presets())
        raise UnknownNameError(f"unknown preset {name!r}. Known: {known}.{did_you_mean(name, presets())}")
    preset = presets()[name]
    if preset.merge_per_block is not None:
        return _merge_in_every_block(preset, shape)
    blocks = [round(stage.block * shape.depth / preset.depth) for stage in preset.stages]
    if len(set(blocks)) < len(blocks):
        raise ScheduleError(
            f"preset {name}",
            [
                f"its {len(blocks)} stages fall on the same blocks in a model of {shape.depth}. "
                f"Possible: a deeper model. Write a schedule of your own instead."
            ],
        )
    return Schedule(tuple(replace(stage, block=block) for stage, block in zip(preset.stages, blocks, strict=True)))


def find_schedule(name_or_path: str, shape: ModelShape) -> Schedule:
    """A preset by name, or a schedule from a YAML file. Raises UnknownNameError, FileError or ScheduleError."""
    if name_or_path.endswith((".yaml", ".yml")):
        return load_schedule(name_or_path)
    return load_preset(name_or_path, shape)


def _merge_in_every_block(preset: PresetFile, shape: ModelShape) -> Schedule:
    """ToMe's constant r: the same number of pairs in each block, at most half of what is there (its own rule)."""
    assert preset.merge_per_block is not None
    stages: list[Stage] = []
    present = shape.patch_tokens
    for block in range(shape.depth):
        merged = min(preset.merge_per_block, present // 2)
        if merged:
            present -= merged
            stages.append(Stage(block=block, at="mid", tokens=present, reduce="merge"))
    return Schedule(tuple(stages))
