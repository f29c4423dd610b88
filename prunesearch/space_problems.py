"""Mistakes of a search space against a model, all at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import cast

from prunesearch.config import BlockSpace, Range, SpaceConfig
from prunesearch.errors import ScheduleError
from prunesearch.registry import did_you_mean
from prunesearch.schedule import PLACES, ModelShape, Place, Schedule, Stage, resolve
from prunesearch.space import Value, blocks_of, grid_of
from prunesearch.tokens import REDUCERS, SCORERS


def space_problems(space: SpaceConfig, shape: ModelShape) -> list[str]:
    """Every mistake of a space for a model, one sentence or two for each, with its field. Empty when all is well."""
    problems = _block_problems(space, shape)
    problems += _value_problems("space", space.keep, space.at, space.score, space.reduce)
    for index, own in enumerate(space.blocks):
        if isinstance(own, BlockSpace):
            place = f"space.blocks[{index}]"
            problems += _value_problems(place, own.keep, own.at, own.score, own.reduce)
            problems += [
                f"{place}.{field}: all blocks share {field} (space.same). Possible: no own choice here. "
                f"Leave it out, or take {field} out of space.same."
                for field in space.same
                if getattr(own, field) is not None
            ]
    return problems or _pair_problems(space, shape)


def _block_problems(space: SpaceConfig, shape: ModelShape) -> list[str]:
    if not space.blocks:
        return ["space.blocks: is empty. Possible: block numbers from 0. Name at least one block."]
    problems = []
    seen: dict[int, int] = {}
    for index, block in enumerate(blocks_of(space)):
        place = f"space.blocks[{index}]"
        if not 0 <= block.block < shape.depth:
            problems.append(
                f"{place}: block {block.block}; possible: 0 to {shape.depth - 1} in this model. Choose one of those."
            )
        if block.block in seen:
            problems.append(f"{place}: block {block.block} is space.blocks[{seen[block.block]}] too. Keep one of them.")
        seen.setdefault(block.block, index)
    return problems


def _value_problems(
    place: str,
    keep: tuple[float, ...] | Range | None,
    at: tuple[str, ...] | None,
    score: tuple[str, ...] | None,
    reduce: tuple[str, ...] | None,
) -> list[str]:
    """Mistakes of the lists in themselves, whatever the block. None is not given."""
    problems = _range_problems(place, keep) if isinstance(keep, Range) else []
    lists: dict[str, tuple[Value, ...]] = {"at": at or (), "score": score or (), "reduce": reduce or ()}
    if isinstance(keep, tuple):
        lists["keep"] = keep
        problems += [
            f"{place}.keep: {value!r}; possible: above 0, up to 1 (1 = no stage here)."
            for value in keep
            if not 0 < value <= 1
        ]
    for field, given in (("keep", keep), ("at", at), ("score", score), ("reduce", reduce)):
        if given == ():
            problems.append(f"{place}.{field}: is empty. Possible: one value or more. Name one.")
    problems += [
        f"{place}.{field}: {value!r} is there {values.count(value)} times. Keep one of them."
        for field, values in lists.items()
        for value in dict.fromkeys(values)
        if values.count(value) > 1
    ]
    for name in lists["at"]:
        if name not in PLACES:
            problems.append(
                f"{place}.at: {name!r}; possible: {', '.join(PLACES)}.{did_you_mean(name, PLACES)} Choose one of those."
            )
    problems += [f"{place}.score: {SCORERS.unknown(name)}" for name in lists["score"] if not _known(name, SCORERS)]
    problems += [f"{place}.reduce: {REDUCERS.unknown(name)}" for name in lists["reduce"] if name not in REDUCERS]
    return problems


def _known(score: Value, scorers: Mapping[str, object]) -> bool:
    return score == "none" or score in scorers


def _range_problems(place: str, keep: Range) -> list[str]:
    if keep.low > keep.high:
        return [f"{place}.keep: low {keep.low:g} is above high {keep.high:g}. Swap them."]
    if keep.step is None:
        return []
    low, high, step = (Decimal(repr(number)) for number in (keep.low, keep.high, keep.step))
    if (high - low) % step == 0:
        return []
    last = float(low + (high - low) // step * step)
    return [
        f"{place}.keep: steps of {keep.step:g} from {keep.low:g} reach {last:g} and miss high {keep.high:g}. "
        f"Possible: a step that divides {float(high - low):g}. Change step, low or high."
    ]


def _pair_problems(space: SpaceConfig, shape: ModelShape) -> list[str]:
    """Combinations of choices that can never become a stage, whatever the keep ratio."""
    problems: dict[str, None] = {}
    for index, block in enumerate(blocks_of(space)):
        keeps = _sample(block.keep)
        scores = [(verb, score) for verb in block.reduce if REDUCERS[verb].ranks for score in block.score]
        scores += [(verb, "none") for verb in block.reduce if not REDUCERS[verb].ranks]
        for at, (verb, score) in itertools.product(block.at, scores):
            stages = [Stage(block.block, at=cast(Place, at), score=score, keep=keep, reduce=verb) for keep in keeps]
            refusals = [_refusal(stage, shape) for stage in stages]
            if refusals and all(refusals):
                problems[f"space.blocks[{index}]: {refusals[-1]}"] = None
    return list(problems)


def _sample(keep: tuple[float, ...] | Range) -> list[float]:
    """Ratios below 1, ascending; of a continuous range its two ends will do, as less is never easier."""
    if isinstance(keep, tuple):
        values: Sequence[float] = keep
    else:
        values = (keep.low, keep.high) if keep.step is None else tuple(grid_of(keep))
        values = [*values, (keep.low + keep.high) / 2]
    return sorted(value for value in set(values) if value < 1.0)


def _refusal(stage: Stage, shape: ModelShape) -> str:
    try:
        resolve(Schedule((stage,)), shape)
    except ScheduleError as error:
        return " ".join(error.problems)
    return ""
