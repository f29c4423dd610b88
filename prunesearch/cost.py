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
from typing import Any

from prunesearch.schedule import Schedule, Step, resolve
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS, SCORERS

Count = Any
"""An int, or a tensor with one count for each image."""


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
    steps = [step for step in resolve(schedule, shape) if not step.is_idle]
    macs, attention_tokens, mlp_tokens = macs_of_counts(shape, steps, [step.after for step in steps])
    return Cost(macs, tuple(attention_tokens), tuple(mlp_tokens))


def macs_of_counts(
    shape: ModelShape, steps: Sequence[Step], after: Sequence[Count]
) -> tuple[Count, list[Count], list[Count]]:
    """MACs of one image, and the tokens that each block's attention and MLP see.

    after: patch tokens after each step. Each count is an int, or a tensor with one value per image. Tensors give
    tensors, and gradients pass through.
    """
    prefix = shape.prefix_tokens
    macs: Count = shape.stem_macs + shape.head_macs
    attention_tokens: list[Count] = []
    mlp_tokens: list[Count] = []
    left = [shape.patch_tokens, *after]
    arriving = [shape.patch_tokens] * len(left) if shape.holds else left
    position = 0
    for block in range(shape.depth):
        for place, counts, tokens in (("pre", arriving, attention_tokens), ("mid", left, mlp_tokens)):
            while position < len(steps) and (steps[position].stage.block, steps[position].stage.at) == (block, place):
                position += 1
            tokens.append(counts[position] + prefix)
        macs = macs + block_macs(shape, attention_tokens[-1], mlp_tokens[-1])
    for index, step in enumerate(steps):
        macs = macs + stage_macs(shape, step, arriving[index], after[index], attention_tokens)
    last = left[-1] + prefix
    macs = macs + (shape.pool_macs + shape.pool_macs_per_token * last + shape.pool_macs_per_pair * last * last)
    return macs, attention_tokens, mlp_tokens


def block_macs(shape: ModelShape, attention_tokens: Count, mlp_tokens: Count) -> Count:
    """MACs of one block."""
    projections = (4 * shape.dim * shape.attention_dim + shape.gate_macs) * attention_tokens
    attention = 2 * shape.attention_dim * attention_tokens * attention_tokens
    fast_path = shape.dim**2 * (attention_tokens - mlp_tokens) if shape.holds else 0
    return projections + attention + shape.mlp_macs * mlp_tokens + fast_path


def stage_macs(
    shape: ModelShape, step: Step, before: Count, after: Count, attention_tokens: Sequence[Count] | Mapping[int, Count]
) -> Count:
    """MACs of a stage's score and verb. attention_tokens: by block; its own and the one before are read."""
    stage, reducer = step.stage, REDUCERS[step.stage.reduce]
    # reducers divide integers, which has no gradient; their share of the cost is small
    macs = reducer.macs(shape, _constant(before), _constant(after - reducer.extra_tokens))
    if stage.score == "none":
        return macs
    scorer = SCORERS[stage.score]
    if not scorer.needs_attention:
        return macs + scorer.macs(shape, before)
    # the score reads an attention: at mid that of this block, at pre that of the block before
    return macs + scorer.macs(shape, attention_tokens[stage.block - (stage.at == "pre")])


def _constant(count: Count) -> Count:
    return count if isinstance(count, (int, float)) else count.detach()
