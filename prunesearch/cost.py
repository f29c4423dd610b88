"""MACs and token counts of a schedule by the closed form; arithmetic only, no forward pass.

What papers call FLOPs are multiply-accumulates. A block of width C and attention width A, with Na tokens in attention
and Nm in the MLP, costs

    3 C A Na + A C Na  (qkv, projection)  +  2 A Na^2  (QK^T, AV)  +  gate_macs Na  +  mlp_macs Nm

The patch embedding, the pooling head, the classifier, and the scorers and reducers themselves are added to this.
Normalisation, softmax, biases and activations are not counted, as in the papers and in torch.utils.flop_counter.

In a model with a feature map (Swin, ConvNeXt), Na is the number of all positions and A is 0. gate_macs is then the
token mixing per position, and each position that skips the MLP costs C C for its fast path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, Protocol

from prunesearch.errors import DeviceError
from prunesearch.profile import Count, Profile
from prunesearch.schedule import Schedule, Step, blocks_read, options_of, resolve
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS, SCORERS

UNSURE = 0.12
"""Errors of a profile above this share are said as doubts."""


class CostTable(Protocol):
    """What the parts of a model cost.

    Token counts are ints, or tensors with one value per image; costs then are tensors, and gradients pass through.
    metric: the computed metric of this cost. unit: of that metric. per_unit: costs of the parts in one unit.
    knows_sizes: whether attention costs something else when tokens have sizes.
    """

    @property
    def metric(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def per_unit(self) -> float: ...
    @property
    def knows_sizes(self) -> bool: ...

    def whole(self, shape: ModelShape) -> float:
        """What does not depend on tokens."""

    def block(self, shape: ModelShape, attention_tokens: Count, mlp_tokens: Count, sized: bool) -> Count:
        """One block without a stage; tokens with the prefix. sized: attention adds log(size) to its logits."""

    def stage(self, shape: ModelShape, step: Step, before: Count, after: Count, scored: Sequence[Count]) -> Count:
        """The score and the verb of a stage; patch tokens. scored: what the score reads, see `tokens_scored`."""

    def end(self, shape: ModelShape, tokens: Count) -> Count:
        """What follows the last block; tokens with the prefix."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates by the closed form."""

    metric: str = "gmacs"
    unit: str = "GMACs"
    per_unit: float = 1e9
    knows_sizes: bool = False

    def whole(self, shape: ModelShape) -> int:
        """Patch embedding, classifier, and what a pooling head needs for any number of tokens."""
        return shape.stem_macs + shape.head_macs + shape.pool_macs

    def block(self, shape: ModelShape, attention_tokens: Count, mlp_tokens: Count, sized: bool = False) -> Count:
        """Projections, attention, gate and MLP; in a model with a feature map also the fast path."""
        projections = (4 * shape.dim * shape.attention_dim + shape.gate_macs) * attention_tokens
        attention = 2 * shape.attention_dim * attention_tokens * attention_tokens
        fast_path = shape.dim**2 * (attention_tokens - mlp_tokens) if shape.holds else 0
        return projections + attention + shape.mlp_macs * mlp_tokens + fast_path

    def stage(self, shape: ModelShape, step: Step, before: Count, after: Count, scored: Sequence[Count]) -> Count:
        """As the registry entries of score and verb say."""
        reducer = REDUCERS[step.stage.reduce]
        # reducers divide integers, which has no gradient; their share of the cost is small
        macs = reducer.macs(shape, _constant(before), _constant(after - reducer.extra_tokens))
        return macs + sum(SCORERS[step.stage.score].macs(shape, tokens) for tokens in scored)

    def end(self, shape: ModelShape, tokens: Count) -> Count:
        """A pooling head that attends."""
        return shape.pool_macs_per_token * tokens + shape.pool_macs_per_pair * tokens * tokens


MACS = Macs()


@dataclass(frozen=True)
class Cost:
    """MACs of one image, and the tokens (prefix included) that each block's attention and MLP see."""

    macs: int
    attention_tokens: tuple[int, ...]
    mlp_tokens: tuple[int, ...]

    @property
    def gmacs(self) -> float:
        """MACs in units of 10^9."""
        return self.macs / 1e9

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that leave each block, prefix included; with a feature map, those that its MLP sees."""
        return self.mlp_tokens


def estimate_cost(shape: ModelShape, schedule: Schedule = Schedule()) -> Cost:
    """Cost of one image under a schedule, by default of the dense model. With thresholds: the most it can cost.

    Raises ScheduleError as `resolve`.
    """
    macs, attention_tokens, mlp_tokens = _of_schedule(shape, schedule, MACS)
    return Cost(macs, tuple(attention_tokens), tuple(mlp_tokens))


def total_cost(shape: ModelShape, schedule: Schedule, table: CostTable = MACS) -> float:
    """Cost of a schedule in the unit of a table: GMACs of an image, or milliseconds of a batch of a profile.

    With thresholds: the most it can cost. Raises ScheduleError as `resolve`, and DeviceError for a stage that the
    profile does not have.
    """
    return _of_schedule(shape, schedule, table)[0] / table.per_unit


class CostTarget(NamedTuple):
    """What images shall cost on average: an amount in the unit of a table."""

    amount: float
    table: CostTable


def target_field(table: CostTable) -> str:
    """The field of a schedule or a space that has a target in the unit of this table."""
    return f"target_{table.metric}"


def target_of(schedule: Schedule, profile: Profile | None) -> CostTarget | None:
    """What the thresholds of a schedule are trained towards, if it says so. Raises DeviceError without a profile that
    it needs."""
    target = schedule.target
    if target is None:
        return None
    for table in (MACS,) if profile is None else (MACS, profile):
        if target_field(table) == target.field:
            return CostTarget(target.amount, table)
    raise DeviceError(
        f"{target.field}: there is no profile of a device to predict {target} by. Possible: a profile of `prunesearch "
        f"profile`: in a study device: {{profile: FILE.json}}, to evaluate a schedule file --study FOLDER, in Python "
        f"Task(profile=...) or finetune(profile=...). Give it, or write target_gmacs in place of it."
    )


def _of_schedule(shape: ModelShape, schedule: Schedule, table: CostTable) -> tuple[Any, list[int], list[int]]:
    steps = [step for step in resolve(schedule, shape) if not step.is_idle]
    return cost_of_counts(shape, steps, [step.after for step in steps], table)


def cost_of_counts(
    shape: ModelShape, steps: Sequence[Step], after: Sequence[Count], table: CostTable = MACS
) -> tuple[Count, list[Count], list[Count]]:
    """Cost of an image (MACS: an int in MACs), and the tokens that each block's attention and MLP see.

    after: patch tokens after each step. Each count is an int, or a tensor with one value per image. Tensors give
    tensors, and gradients pass through.
    """
    prefix = shape.prefix_tokens
    cost: Count = table.whole(shape)
    attention_tokens: list[Count] = []
    mlp_tokens: list[Count] = []
    arriving: list[Count] = []
    away: list[tuple[Step, Count, bool]] = []  # steps whose tokens will come back, with what there was before them
    present: Count = shape.patch_tokens
    sized = False  # whether tokens have sizes, which attention adds to its logits
    for block in range(shape.depth):
        while away and away[-1][0].returns_by(block):
            _, present, sized = away.pop()
        for place, tokens in (("pre", attention_tokens), ("mid", mlp_tokens)):
            while len(arriving) < len(steps) and _is_at(steps[len(arriving)], block, place):
                step, index = steps[len(arriving)], len(arriving)
                arriving.append(shape.patch_tokens if shape.holds else present)
                if step.until is not None:
                    away.append((step, present, sized))
                present, sized = after[index], sized or (table.knows_sizes and gives_sizes(step))
            if place == "pre":
                sized_attention = sized
            tokens.append((shape.patch_tokens if shape.holds and place == "pre" else present) + prefix)
        cost = cost + table.block(shape, attention_tokens[-1], mlp_tokens[-1], sized_attention)
    for index, (step, blocks) in enumerate(zip(steps, blocks_read(steps), strict=True)):
        scored = tokens_scored(step, arriving[index], blocks, attention_tokens)
        cost = cost + table.stage(shape, step, arriving[index], after[index], scored)
    present = away[0][1] if away else present
    return cost + table.end(shape, present + prefix), attention_tokens, mlp_tokens


def _is_at(step: Step, block: int, place: str) -> bool:
    return step.stage.block == block and step.stage.at == place


def tokens_scored(
    step: Step, before: Count, blocks: Sequence[int], attention_tokens: Sequence[Count] | Mapping[int, Count]
) -> list[Count]:
    """The tokens that a stage's score reads: those of each attention, or the patch tokens when it reads none.

    blocks: see `blocks_read`. attention_tokens: by block.
    """
    score = step.stage.score
    if score == "none":
        return []
    return [attention_tokens[block] for block in blocks] if SCORERS[score].needs_attention else [before]


def gives_sizes(step: Step) -> bool:
    """Whether later attention weights tokens by how many they stand for, because of this step."""
    stage = step.stage
    return REDUCERS[stage.reduce].merges and bool(options_of(stage).get("proportional_attention", False))


def _constant(count: Count) -> Count:
    return count if isinstance(count, (int, float)) else count.detach()


def doubts(profile: Profile) -> list[str]:
    """Why the numbers of a profile are not to be relied on, in one sentence; empty when there is no such reason."""
    curves = (profile.attention, profile.sized_attention, profile.mlp, profile.last)
    found = {
        "parts were measured within {} (median)": median(e for curve in curves if curve for e in curve.error),
        "whole schedules are within {} of their parts": max(map(abs, profile.check), default=0.0),
        "the dense model is within {} of its parts": abs(
            total_cost(profile.shape, Schedule(), profile) / profile.dense_ms - 1
        ),
    }
    said = [text.format(f"{error:.0%}") for text, error in found.items() if error > UNSURE]
    todo = "Profile again for longer (--seconds), while nothing else runs on this machine, before you decide by it."
    return [f"Not sure: {', '.join(said)}. {todo}"] if said else []
