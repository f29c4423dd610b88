"""`Plan`: a schedule made ready to run, with the steps of each block; and the learned parts of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn

from prunesearch.errors import ModelError, ScheduleError
from prunesearch.models.swap import Place, Swapped, swap, swap_back
from prunesearch.schedule import (
    Schedule,
    Stage,
    Step,
    blocks_read,
    options_of,
    reads_attention,
    remembers,
    resolve,
    spelled_out,
)
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS, SCORERS, Reducer

PARTS = "token_stages"
"""Attribute of the model that holds the schedule's learned parts. It is the prefix of their names in a state_dict."""


class StageParts(nn.Module):
    """The learned parts of one stage: module of the scorer, module of the reducer, threshold. Each may be None."""

    def __init__(self, scorer: nn.Module | None, reducer: nn.Module | None, threshold: float | None) -> None:
        super().__init__()
        self.scorer, self.reducer = scorer, reducer
        # float32 in every model, because differences between thresholds are small. It has one dimension, because
        # fully_shard refuses parameters without any
        self.threshold = None if threshold is None else nn.Parameter(torch.tensor([threshold], dtype=torch.float32))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        name = f"{prefix}threshold"
        if name in state_dict:  # earlier versions saved it without a dimension
            state_dict[name] = state_dict[name].reshape(-1)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PlannedStep(NamedTuple):
    """A step that is ready to run.

    key: name of its stage's learned parts. counts_differ: this stage has a threshold, or an earlier one whose tokens
    are not back, so images have different counts from here on. decisions_learn: the same for decisions that learn, so
    in training tokens stay in their slots from here on. softness: width of the soft comparison with the threshold, in
    units of the score.
    reads_attention: of one block, for its score or for keys. remembers: its score is a running mean over blocks.
    """

    step: Step
    key: str
    counts_differ: bool
    decisions_learn: bool
    softness: float
    reads_attention: bool
    remembers: bool

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.step.stage


@dataclass(frozen=True)
class BlockPlan:
    """The steps of one block.

    listening: the steps that read this block's attention, of its `mid` and then of the next block's `pre`. needs_keys:
    one of them matches tokens by their keys. remembering: the step whose running mean of scores this block's attention
    adds to. listens: something reads the block's attention.
    """

    pre: tuple[PlannedStep, ...] = ()
    mid: tuple[PlannedStep, ...] = ()
    listening: tuple[PlannedStep, ...] = ()
    needs_keys: bool = False
    remembering: PlannedStep | None = None
    listens: bool = False


@dataclass(frozen=True)
class Plan:
    """A schedule resolved for one number of patch tokens.

    merges: a verb gives tokens a size. log_size_bias: attention adds log(size) to its logits. leaves_places: a token
    that stands for several may lie between the places of the image. all_return: every token is in its place after the
    last block. The four hold for any number of tokens. steps: every step, in the order they run. counts_differ: images
    keep different numbers of tokens. decisions_learn: decisions learn, so that tokens stay in their slots in training.
    """

    schedule: Schedule
    shape: ModelShape
    blocks: tuple[BlockPlan, ...]
    merges: bool
    log_size_bias: bool
    leaves_places: bool
    all_return: bool
    steps: tuple[PlannedStep, ...]
    counts_differ: bool
    decisions_learn: bool

    @property
    def ends_masked(self) -> bool:
        """Whether images may end with different numbers of tokens, or with masked ones in training."""
        return self.decisions_learn and not self.all_return


def make_plan(schedule: Schedule, shape: ModelShape) -> Plan:
    """Resolve a schedule. Raises ScheduleError."""
    planned = list(_planned(resolve(schedule, shape), shape))
    read = zip(planned, blocks_read([one.step for one in planned]), strict=True)
    remembering = {block: one for one, blocks in read if one.remembers for block in blocks}

    def at(block: int, place: str) -> tuple[PlannedStep, ...]:
        return tuple(step for step in planned if (step.stage.block, step.stage.at) == (block, place))

    def of(block: int) -> BlockPlan:
        around = (*at(block, "mid"), *at(block + 1, "pre"))
        listening = tuple(step for step in around if step.reads_attention)
        needs_keys = any(REDUCERS[step.stage.reduce].needs_keys for step in listening)
        listens = bool(listening) or block in remembering
        return BlockPlan(at(block, "pre"), at(block, "mid"), listening, needs_keys, remembering.get(block), listens)

    blocks = tuple(map(of, range(shape.depth)))
    # of all stages: one that removes nothing here may do so at another size of images
    stages = spelled_out(schedule, shape).stages
    merging = [stage for stage in stages if REDUCERS[stage.reduce].merges]
    log_size_bias = any(options_of(stage).get("proportional_attention", False) for stage in merging)
    leaves_places = any(_leaves_places(stage) for stage in stages)
    all_return = shape.holds or all(stage.until is not None for stage in stages)
    steps = tuple(step for block in blocks for step in (*block.pre, *block.mid))
    return Plan(
        schedule,
        shape,
        blocks,
        bool(merging),
        log_size_bias,
        leaves_places,
        all_return,
        steps,
        counts_differ=any(step.counts_differ for step in steps),
        decisions_learn=any(step.decisions_learn for step in steps),
    )


def _leaves_places(stage: Stage) -> bool:
    verb = REDUCERS[stage.reduce]
    return verb.pools or verb.extra_tokens > 0 or options_of(stage).get("position") == "mean"


def plan_for(plan: Plan, patch_tokens: int) -> Plan:
    """The plan for images with this many patch tokens (dynamic_img_size); `plan` itself for the model's own size.

    Raises ScheduleError when the schedule or its learned parts do not fit that many patch tokens, and ModelError when
    torch.compile meets another size.
    """
    if patch_tokens == plan.shape.patch_tokens:
        return plan
    if torch.compiler.is_dynamo_compiling():
        raise ModelError(
            "model: torch.compile cannot resolve a schedule for images of another size than the model's own. Possible: "
            "a model of that size. Call set_input_size on it (or build it with img_size), then apply_schedule, and "
            "compile it then."
        )
    return _plan_at(plan, int(patch_tokens))


@lru_cache(maxsize=1024)  # images of patches have as many sizes; a plan takes milliseconds
def _plan_at(plan: Plan, patch_tokens: int) -> Plan:
    place = f"schedule, on images of {patch_tokens} patch tokens (the model is built for {plan.shape.patch_tokens})"
    try:
        other = make_plan(plan.schedule, replace(plan.shape, patch_tokens=patch_tokens))
    except ScheduleError as error:
        raise ScheduleError(place, error.problems) from None
    here, there = _learned_shapes(plan), _learned_shapes(other)
    problems = [
        f"stage at block {planned.stage.block} ({planned.stage.at}): {planned.stage.reduce} to {planned.step.kept} of "
        f"{planned.step.before} needs {what}. Possible: images of the model's own size, or a model built for this "
        f"size, with weights trained there. Resize the images."
        for planned in (*other.steps, *_idle_there(plan, other))
        if (what := _misfit(planned.key, here, there)) is not None
    ]
    if problems:
        raise ScheduleError(place, problems)
    return other


def _learned_shapes(plan: Plan) -> dict[str, dict[str, torch.Size]]:
    """Shapes of the parameters and buffers of each stage that learns, by the stage's key."""
    with torch.device("meta"):
        parts = make_parts(plan, seed=0)
    stages = {} if parts is None else dict(parts.items())
    return {key: {name: value.shape for name, value in stage.state_dict().items()} for key, stage in stages.items()}


def _idle_there(plan: Plan, other: Plan) -> list[PlannedStep]:
    """Steps of `plan` whose verb learns and which remove nothing at the other size.

    Such a step cannot be left out, because later layers were trained on the verb's output. A step with a learned score
    alone can be left out, because all its tokens stay.
    """
    keys = {planned.key for planned in other.steps}
    return [step for step in plan.steps if step.key not in keys and REDUCERS[step.stage.reduce].part is not None]


def _misfit(key: str, here: dict[str, dict[str, torch.Size]], there: dict[str, dict[str, torch.Size]]) -> str | None:
    """How the learned parts of a stage differ from those it needs at another size; None when they fit."""
    if here.get(key) == there.get(key):
        return None
    if key not in here:
        return "learned parts, which it has not, as it removes nothing at the model's own size"
    if key not in there:
        return "more patch tokens than these images have"
    return "learned parts of other shapes than it has"


def threshold_unit(stage: Stage, shape: ModelShape) -> float:
    """A typical value that a stage's threshold is compared with: a score, or 1 for the cosine of a pair."""
    return SCORERS[stage.score].unit(shape) if REDUCERS[stage.reduce].ranks else 1.0


def make_parts(plan: Plan, seed: int) -> nn.ModuleDict | None:
    """New learned parts for a plan, on the CPU, initialised from the seed; None when nothing learns."""
    parts = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for planned, until in zip(plan.steps, _until(plan), strict=True):
            stage, reducer = planned.stage, REDUCERS[planned.stage.reduce]
            make_scorer = None if stage.score == "none" else SCORERS[stage.score].part
            if make_scorer is None and reducer.part is None and stage.threshold is None:
                continue
            parts[planned.key] = StageParts(
                None if make_scorer is None else make_scorer(plan.shape),
                _reducer_part(reducer, plan.shape, planned, until),
                stage.threshold,
            )
    return nn.ModuleDict(parts) if parts else None


def attach(model: nn.Module, plan: Plan, parts: nn.ModuleDict | None, places: Sequence[Place]) -> None:
    """Give a model without a schedule its plan, its parts, and the classes of `places`. Cannot fail."""
    if parts is not None:
        setattr(model, PARTS, parts)
    model._plan = plan  # type: ignore[assignment]
    swap(places)


def detach(model: nn.Module, places: Sequence[Place]) -> None:
    """Undo `attach`."""
    swap_back(places)
    del model._plan
    if hasattr(model, PARTS):
        delattr(model, PARTS)


def attached(model: nn.Module) -> Schedule | None:
    """The schedule of the attached plan with its current thresholds; None without one."""
    if not isinstance(model, Swapped):
        return None
    plan: Plan = model._plan  # type: ignore[assignment]
    return with_thresholds(plan.schedule, plan, getattr(model, PARTS, None))


def with_thresholds(schedule: Schedule, plan: Plan, parts: nn.ModuleDict | None) -> Schedule:
    """The schedule with the current values of its thresholds."""
    if parts is None:
        return schedule
    learned: dict[Stage, list[Tensor]] = {}
    for planned in plan.steps:
        if planned.stage.threshold is not None:
            learned.setdefault(planned.stage, []).append(parts[planned.key].threshold)  # type: ignore[arg-type]
    stages = [
        replace(stage, threshold=_shortest(learned[as_planned].pop(0))) if learned.get(as_planned) else stage
        for stage, as_planned in zip(schedule.stages, spelled_out(schedule, plan.shape).stages, strict=True)
    ]
    return replace(schedule, stages=tuple(stages))


def block_key(block: int) -> str:
    """Key of a block's module in the learned part of a verb that holds."""
    return f"block{block}"


def _reducer_part(reducer: Reducer, shape: ModelShape, planned: PlannedStep, until: int) -> nn.Module | None:
    if reducer.part is None:
        return None
    if not reducer.holds:
        return reducer.part(shape, planned.step.kept)
    blocks = range(planned.stage.block, until)
    return nn.ModuleDict({block_key(block): reducer.part(shape, planned.step.kept) for block in blocks})


def _until(plan: Plan) -> list[int]:
    """For each step, the block of the next step; for the last one the number of blocks."""
    return [*(planned.stage.block for planned in plan.steps[1:]), plan.shape.depth][: len(plan.steps)]


def _shortest(value: Tensor) -> float:
    """The shortest decimal that equals this float32, so that a threshold of 0.001 is written as 0.001."""
    return float(str(numpy.float32(value.item())))


def _planned(steps: tuple[Step, ...], shape: ModelShape) -> Iterable[PlannedStep]:
    seen: dict[tuple[int, str], int] = {}
    taken: list[Step] = []
    for step in steps:
        stage, place = step.stage, (step.stage.block, step.stage.at)
        index = seen[place] = seen.get(place, -1) + 1
        if step.is_idle:
            continue
        lasting = [stage, *(earlier.stage for earlier in taken if not earlier.returns_by(stage.block))]
        taken.append(step)
        counts_differ = any(one.is_adaptive for one in lasting)
        decisions_learn = any(one.is_adaptive or one.learns_to_score for one in lasting)
        key = f"block{stage.block}_{stage.at}" + (f"_{index}" if index else "")
        # AS-ViT: 1e-4 for scores of about 1/196; LTMP: 0.1 for cosines
        softness = 0.02 * threshold_unit(stage, shape) if REDUCERS[stage.reduce].ranks else 0.1
        means = remembers(stage)
        reads = REDUCERS[stage.reduce].needs_keys or (reads_attention(stage) and not means)
        yield PlannedStep(step, key, counts_differ, decisions_learn, softness, reads, means)
