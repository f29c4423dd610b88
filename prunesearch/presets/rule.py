"""Fit a preset to a model: its blocks to the depth, its amounts to the number of patch tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import product

from prunesearch.cost import estimate_cost
from prunesearch.errors import ScheduleError
from prunesearch.files import PresetFile, PresetStage
from prunesearch.schedule import END, NEXT, PLACES, Schedule, Stage, count_of
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS, SCORERS


def fit(name: str, preset: PresetFile, shape: ModelShape) -> Schedule:
    """The schedule of a preset for a model. Raises ScheduleError when its rules cannot fit."""
    problems = list(_misfits(preset, shape))
    if problems:
        raise ScheduleError(f"preset {name}", problems)
    rows = [
        replace(
            row,
            block=None if row.block is None else _scaled(row.block, preset, shape),
            threshold=None if row.threshold is None else row.threshold * _unit(row, preset, shape),
        )
        for row in preset.stages
    ]
    stages = expand(rows, shape.depth, shape.patch_tokens)
    if not stages:
        raise ScheduleError(
            f"preset {name}",
            [
                f"it removes nothing from {shape.patch_tokens} patch tokens. Possible: a model with more of them. "
                f"Choose another preset."
            ],
        )
    return Schedule(stages, None if preset.target is None else preset.target * estimate_cost(shape).gmacs)


def expand(rows: Sequence[PresetStage], depth: int, patch_tokens: int) -> tuple[Stage, ...]:
    """Turn rows into stages with amounts for this model. Stages that remove nothing are left out.

    The blocks of the rows are already those of the model.
    """
    stages: list[Stage] = []
    present = patch_tokens
    away: list[tuple[int, int]] = []  # blocks before which tokens are back, and how many there are then
    for block, place, row in product(range(depth), PLACES, rows):
        while away and away[-1][0] <= block:
            present = away.pop()[1]
        if _is_there(row, block) and row.at == place:
            stage = _stage(row, block, depth, present, patch_tokens)
            if stage is None:
                continue
            stages.append(stage)
            if REDUCERS[stage.reduce].holds or stage.until == NEXT:
                continue  # the next stage chooses among all again
            if isinstance(stage.until, int):
                away.append((stage.until, present))
            kept = count_of(stage, present)
            present = kept + (REDUCERS[stage.reduce].extra_tokens if kept < present else 0)
    return tuple(stages)


def _is_there(row: PresetStage, block: int) -> bool:
    if row.every is not None:
        first = row.block or 0
        return block >= first and (block - first) % row.every == 0
    return row.block in (None, block)


def _stage(row: PresetStage, block: int, depth: int, present: int, patch_tokens: int) -> Stage | None:
    keep, tokens = row.keep, None
    if row.keep_of_original is not None:
        tokens = math.floor(Decimal(repr(row.keep_of_original)) * patch_tokens)
    elif row.tokens is not None:
        tokens = row.tokens[block if len(row.tokens) > 1 else 0]
    elif row.remove is not None:
        tokens = max(present - _removed(row, block, depth), REDUCERS[row.reduce].fewest_kept(present))
    if tokens is not None and tokens >= present:
        return None
    until: int | str | None = row.until
    if row.blocks_away is not None:
        until = block + row.blocks_away if block + row.blocks_away < depth else END
    return Stage(block, row.at, row.score, keep, tokens, row.threshold, row.reduce, row.options, until)


def _removed(row: PresetStage, block: int, depth: int) -> int:
    """How many tokens go in a block: linear from the first block to the last and truncated, as in ToMe."""
    assert row.remove is not None
    if row.remove_last is None or depth == 1:
        return row.remove
    return int(row.remove + (row.remove_last - row.remove) / (depth - 1) * block)


def _scaled(block: int, preset: PresetFile, shape: ModelShape) -> int:
    return round(block * shape.depth / preset.depth)


def _unit(row: PresetStage, preset: PresetFile, shape: ModelShape) -> float:
    """The factor from a threshold for the preset's model to one for this model."""
    if row.score not in SCORERS:
        return 1.0  # `merge` compares cosines
    scorer = SCORERS[row.score]
    return scorer.unit(shape) / scorer.unit(replace(shape, patch_tokens=preset.patch_tokens))


def _misfits(preset: PresetFile, shape: ModelShape) -> Iterator[str]:
    if any(REDUCERS[row.reduce].holds != shape.holds for row in preset.stages):
        with_map, without = "models with a feature map (Swin, ConvNeXt)", "models whose tokens can go (ViT, DeiT)"
        wanted, found = (without, "one with a feature map") if shape.holds else (with_map, "one without")
        yield f"it is for {wanted}, and this is {found}. Possible: those. Choose another preset or another model."
        return
    written = {row.block for row in preset.stages if row.block is not None}
    scaled = {_scaled(block, preset, shape) for block in written}
    if len(scaled) < len(written) or max(scaled, default=0) >= shape.depth:
        blocks = ", ".join(map(str, sorted(written)))
        yield (
            f"its stages at blocks {blocks} of {preset.depth} fall on the same blocks, or behind the last, in a model "
            f"of {shape.depth}. Possible: a deeper model. Write a schedule of your own instead."
        )
    listed = any(row.tokens is not None and len(row.tokens) > 1 for row in preset.stages)
    if listed and (shape.depth, shape.patch_tokens) != (preset.depth, preset.patch_tokens):
        yield (
            f"its counts were searched for {preset.depth} blocks and {preset.patch_tokens} patch tokens, but this "
            f"model has {shape.depth} and {shape.patch_tokens}; no rule makes them fit. Possible: models of that "
            f"shape. Choose another preset, or search counts for this model."
        )
