"""Find all mistakes in a search space for a model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import cast

from prunesearch.config import LARGEST, MOST_VALUES, BlockSpace, Range, SpaceConfig, ThresholdRange
from prunesearch.cost import MACS, CostTable, target_field, total_cost
from prunesearch.errors import ScheduleError
from prunesearch.registry import did_you_mean
from prunesearch.schedule import END, NEXT, PLACES, Place, Schedule, Stage, resolve
from prunesearch.shape import ModelShape
from prunesearch.space.choices import (
    FIELDS,
    UNTIL,
    BlockChoices,
    Value,
    blocks_of,
    combination,
    combinations,
    grid_of,
    is_counted,
    may_return,
    schedule_from,
    takes_threshold,
    until_of,
)
from prunesearch.tokens import REDUCERS, SCORERS

MOST_TRIED = 2000
"""Combinations of a space that are tried for one that is possible, which takes a tenth of a second."""
AMOUNTS = ("keep", "threshold", "none")


def space_problems(space: SpaceConfig, shape: ModelShape) -> list[str]:
    """All mistakes in a space for a model, one message each, which names the field. Empty when there are none."""
    problems = _block_problems(space, shape)
    problems += _value_problems("space", space, shape)
    for index, own in enumerate(space.blocks):
        if isinstance(own, BlockSpace):
            place = f"space.blocks[{index}]"
            problems += _value_problems(place, own, shape)
            problems += [
                f"{place}.{field}: all blocks share {field} (space.same). Possible: no own choice here. "
                f"Leave it out, or take {field} out of space.same."
                for field in space.same
                if getattr(own, field) is not None
            ]
    problems = problems or _never_back(space, shape)
    if problems:
        return problems
    problems = _unread(space) + _target_problems(space, shape) + _pair_problems(space, shape)
    problems = problems or _order_problems(space) + _most_stages_problems(space)
    return problems or _nothing_possible(space, shape)


def _never_back(space: SpaceConfig, shape: ModelShape) -> list[str]:
    """A message when tokens may be away for good from a model that gives classes to each patch."""
    if shape.segments:
        for index, (own, block) in enumerate(zip(space.blocks, blocks_of(space), strict=True)):
            if "never" in block.until and any(may_return(verb) for verb in block.reduce):
                place = f"space.blocks[{index}]" if isinstance(own, BlockSpace) and own.until is not None else "space"
                return [
                    f"{place}.until: never takes tokens away for good, but this model gives classes to each patch, so "
                    f"all must be back at the end. Possible: next, {END}. Write until: [{NEXT}, {END}]."
                ]
    return []


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


def _value_problems(place: str, given: SpaceConfig | BlockSpace, shape: ModelShape) -> list[str]:
    """Mistakes in the values of a space, or of one block (where a field that is None was not given)."""
    keep = given.keep
    problems = _range_problems(place, keep) if isinstance(keep, Range) else []
    problems += _threshold_problems(f"{place}.threshold", given.threshold, 0.0, LARGEST, "scores are shares")
    problems += _threshold_problems(f"{place}.merge_threshold", given.merge_threshold, -1.0, 1.0, "a cosine")
    lists: dict[str, tuple[Value, ...]] = {
        "at": given.at or (),
        "score": given.score or (),
        "reduce": given.reduce or (),
        "amount": given.amount or (),
        "until": given.until or (),
    }
    for field in ("threshold", "merge_threshold"):
        if isinstance(getattr(given, field), tuple):
            lists[field] = getattr(given, field)
    if given.tokens is not None:
        lists["tokens"] = given.tokens
        problems += [
            f"{place}.tokens: {count}; possible: 1 to {shape.patch_tokens} patch tokens in this model. Correct it."
            for count in given.tokens
            if not 1 <= count <= shape.patch_tokens
        ]
    if isinstance(keep, tuple):
        lists["keep"] = keep
        problems += [
            f"{place}.keep: {value!r}; possible: above 0, up to 1 (1 = no stage here)."
            for value in keep
            if not 0 < value <= 1
        ]
    problems += [
        f"{place}.{field}: is empty. Possible: one value or more. Name one."
        for field in FIELDS
        if getattr(given, field) == ()
    ]
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
    problems += [
        f"{place}.amount: {name!r}; possible: {', '.join(AMOUNTS)}.{did_you_mean(name, AMOUNTS)} Choose one of those."
        for name in lists["amount"]
        if name not in AMOUNTS
    ]
    problems += [
        f"{place}.until: {name!r}; possible: {', '.join(UNTIL)}.{did_you_mean(name, UNTIL)} Choose one of those."
        for name in lists["until"]
        if name not in UNTIL
    ]
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
    if (high - low) / step > MOST_VALUES:
        return [
            f"{place}.keep: {int((high - low) / step):,} steps of {keep.step:g}; possible: up to {MOST_VALUES}. "
            f"Take a longer step, or leave it out: the range is continuous then."
        ]
    if (high - low) % step == 0:
        return []
    last = float(low + (high - low) // step * step)
    return [
        f"{place}.keep: steps of {keep.step:g} from {keep.low:g} reach {last:g} and miss high {keep.high:g}. "
        f"Possible: a step that divides {float(high - low):g}. Change step, low or high."
    ]


def _threshold_problems(
    place: str, given: tuple[float, ...] | ThresholdRange | None, low: float, high: float, what: str
) -> list[str]:
    """Mistakes in a range that must lie between low and high. The values of lists were checked when they were read."""
    if not isinstance(given, ThresholdRange):
        return []
    problems = [
        f"{place}: {name} is {value:g}; possible: from {low:g} up to {high:g} ({what}). Correct it."
        for name, value in (("low", given.low), ("high", given.high))
        if not low <= value <= high
    ]
    if given.low > given.high:
        problems.append(f"{place}: low {given.low:g} is above high {given.high:g}. Swap them.")
    if given.log and given.low <= 0:
        problems.append(f"{place}: low is {given.low:g}; possible with log: above 0. Raise it, or leave log out.")
    return problems


def _unread(space: SpaceConfig) -> list[str]:
    """Fields that are given but have no effect, and fields that are missing although a choice needs them."""
    problems = []
    blocks = blocks_of(space)
    readable = False
    for field, ranks in (("threshold", True), ("merge_threshold", False)):
        readers = [
            block.block
            for block in blocks
            if "threshold" in block.amount
            and any(
                takes_threshold(score, verb) and REDUCERS[verb].ranks == ranks
                for verb, score in _verbs_and_scores(block)
            )
        ]
        readable = readable or bool(readers)
        lacking = [block.block for block in blocks if block.block in readers and getattr(block, field) is None]
        example = "{low: 0.001, high: 0.05, log: true}" if ranks else "[0.7, 0.8, 0.9]"
        if lacking:
            problems.append(
                f"space.{field}: amount threshold is possible at block {lacking[0]}, but no {field} is given. "
                f"Possible: a list or a range. Write for example {field}: {example}."
            )
        if getattr(space, field) is not None and not readers:
            problems.append(
                f"space.{field}: no block can take it. Possible: amount: [threshold] with verbs that do. "
                f"Leave it out, or add threshold to amount."
            )
    if not readable and any({"threshold", "keep"} <= set(block.amount) for block in blocks):
        problems.append(
            "space.amount: threshold is given, but every verb and score here takes a count. Possible: keep and none; "
            "thresholds go with verbs and scores that take them. Take threshold out, or change verbs or scores."
        )
    pooling = [verb for verb, entry in REDUCERS.items() if entry.pools]
    if space.tokens is not None and not any(
        "keep" in block.amount and set(pooling) & set(block.reduce) for block in blocks
    ):
        problems.append(
            f"space.tokens: no block can pool to a count. Possible: {' or '.join(pooling)} in reduce and keep in "
            f"amount. Leave it out, or add what is missing."
        )
    if space.until != SpaceConfig.until and not any(may_return(verb) for block in blocks for verb in block.reduce):
        possible = ", ".join(verb for verb in REDUCERS if may_return(verb))
        problems.append(
            f"space.until: no verb here has tokens that could be told when to come back. Possible: with {possible}. "
            f"Leave it out, or add one of these to reduce."
        )
    ranking = any(REDUCERS[verb].ranks for block in blocks for verb in block.reduce)
    if not ranking and space.score != SpaceConfig.score:
        problems.append("space.score: no verb here ranks tokens, so a score has no effect. Leave it out.")
    for index, own in enumerate(space.blocks):
        if isinstance(own, BlockSpace) and own.score is not None:
            verbs = own.reduce or space.reduce
            if not any(REDUCERS[verb].ranks for verb in verbs):
                problems.append(
                    f"space.blocks[{index}].score: {', '.join(verbs)} ranks no tokens, so a score has no effect. "
                    f"Leave it out."
                )
    return problems


def _target_problems(space: SpaceConfig, shape: ModelShape) -> list[str]:
    if len(space.targets) > 1:
        return [f"space: {' and '.join(space.targets)} are given. Possible: one target. Leave the other out."]
    if not any("threshold" in block.amount for block in blocks_of(space)):
        return [
            f"space.{field}: no stage can have a threshold that would move towards it. Possible: amount: "
            f"[threshold]. Leave it out, or add threshold to amount."
            for field in space.targets
        ]
    return target_range_problems(space, shape, MACS)


def target_range_problems(space: SpaceConfig, shape: ModelShape, table: CostTable) -> list[str]:
    """Targets in the unit of a table that no schedule can have, because they are above the dense model's cost."""
    field = target_field(table)
    target = space.targets.get(field)
    if target is None:
        return []
    dense = total_cost(shape, Schedule(), table)
    problems = _threshold_problems(f"space.{field}", target, 0.0, dense, "the dense model's cost")
    for value in target if isinstance(target, tuple) else (target.low, target.high):
        if not 0 < value <= dense:
            problems.append(
                f"space.{field}: {value:g}; possible: above 0, up to the dense model's {dense:.4g}. Correct it."
            )
    return problems


def _pair_problems(space: SpaceConfig, shape: ModelShape) -> list[str]:
    """Combinations of choices that cannot become a stage at any keep ratio."""
    problems: dict[str, None] = {}
    for index, block in enumerate(blocks_of(space)):
        keeps = _easiest(block.keep)
        kinds = itertools.product(block.at, _verbs_and_scores(block), block.amount, block.until)
        for at, (verb, score), amount, until in kinds:
            where = cast(Place, at)
            stage = partial(Stage, block.block, at=where, score=score, reduce=verb, until=until_of(until, verb))
            stages = []
            if amount == "keep" and is_counted(verb, block):
                stages = [stage(tokens=max(block.tokens or (1,)))]
            elif amount == "keep":
                stages = [stage(keep=keep) for keep in keeps]
            if amount == "threshold" and takes_threshold(score, verb):
                stages = [stage(threshold=1.0)]
            elif amount == "threshold" and "keep" not in block.amount:
                what = verb if score == "none" else f"{verb} by {score}"
                problems[
                    f"space.blocks[{index}]: amount is threshold, but {what} takes a count. Possible: keep in amount, "
                    f"or verbs and scores that take a threshold. Change one of them."
                ] = None
            for refusal in filter(None, (_refusal(stage, shape) for stage in stages)):
                problems[f"space.blocks[{index}]: {refusal}"] = None
    return list(problems)


def _most_stages_problems(space: SpaceConfig) -> list[str]:
    """A message when more blocks always have a stage than `max_stages` allows."""
    always = [block.block for block in blocks_of(space) if not _may_be_without(block)]
    if space.max_stages is None or len(always) <= space.max_stages:
        return []
    return [
        f"space.max_stages: {space.max_stages}, but blocks {', '.join(map(str, sorted(always)))} always have a stage. "
        f"Possible: from {len(always)}. Raise it, or let blocks go without: 1.0 in keep, or none in amount."
    ]


def _nothing_possible(space: SpaceConfig, shape: ModelShape) -> list[str]:
    """One message when the stages of every combination contradict each other. Large spaces are not searched for one."""
    count, why = combinations(space), ""
    if count is None or count > MOST_TRIED:
        return []
    for index in range(count):
        try:
            resolve(schedule_from(combination(space, index), space, shape), shape)
        except ScheduleError as error:
            why = why or error.problems[0]
        else:
            return []
    return [f"space: none of its {count:,} combinations is possible. The first: {why}"]


def _may_be_without(block: BlockChoices) -> bool:
    """Whether one of the choices leaves the block without a stage."""
    high = block.keep.high if isinstance(block.keep, Range) else max(block.keep, default=0.0)
    return "none" in block.amount or ("keep" in block.amount and high == 1.0)


def _order_problems(space: SpaceConfig) -> list[str]:
    """Verbs that no candidate can have, because a block before them always learns its decisions."""
    learning: int | None = None
    problems = []
    for block in sorted(blocks_of(space), key=lambda block: block.block):
        refused = [verb for verb in block.reduce if learning is not None and REDUCERS[verb].masked is None]
        problems += [
            f"space.blocks: {verb} at block {block.block} cannot follow a stage that learns its decisions (a threshold "
            f"or a learned score), and block {learning} always has one. Possible: a choice without one there, or other "
            f"verbs here. Change one of them."
            for verb in refused
        ]
        if learning is None and _always_learns(block):
            learning = block.block
    return problems


def _always_learns(block: BlockChoices) -> bool:
    if _may_be_without(block):
        return False
    thresholds = block.amount == ("threshold",)
    return thresholds or all(score in SCORERS and SCORERS[score].part for _, score in _verbs_and_scores(block))


def _verbs_and_scores(block: BlockChoices) -> list[tuple[str, str]]:
    """All pairs of verb and score; the score is "none" for verbs that do not rank."""
    ranked = [(verb, score) for verb in block.reduce if REDUCERS[verb].ranks for score in block.score]
    return ranked + [(verb, "none") for verb in block.reduce if not REDUCERS[verb].ranks]


def _easiest(keep: tuple[float, ...] | Range) -> list[float]:
    """The largest ratio below 1, as a list of one; empty when there is none.

    When a smaller ratio is possible, this one is too.
    """
    if isinstance(keep, tuple):
        values: Sequence[float] = keep
    elif keep.step is not None:
        values = tuple(grid_of(keep))
    else:
        values = (keep.low, (keep.low + keep.high) / 2, keep.high)
    return sorted(value for value in values if value < 1.0)[-1:]


def _refusal(stage: Stage, shape: ModelShape) -> str:
    try:
        resolve(Schedule((stage,)), shape)
    except ScheduleError as error:
        return " ".join(error.problems)
    return ""
