"""MACs and token counts of a schedule by the closed form; arithmetic only, no forward pass.

What papers call FLOPs are multiply-accumulates. Per block, with Na tokens in attention and Nm in the MLP:

    3 C A Na + A C Na  (qkv, projection)  +  2 A Na^2  (QK^T, AV)  +  mlp_macs Nm

plus the patch embedding, the classifier, and what scorers and reducers cost themselves. Normalisation, softmax,
biases and activations are not counted, as in the papers and in torch.utils.flop_counter.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunesearch.schedule import ModelShape, Schedule, Step, resolve
from prunesearch.tokens import REDUCERS, SCORERS


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
        """Tokens that leave each block, prefix included."""
        return self.mlp_tokens


def estimate_cost(shape: ModelShape, schedule: Schedule = Schedule()) -> Cost:
    """What one image costs under a schedule (the dense model by default). Raises ScheduleError as `resolve`."""
    steps = [step for step in resolve(schedule, shape) if not step.is_idle]
    prefix, present = shape.prefix_tokens, shape.patch_tokens
    macs = shape.stem_macs + shape.head_macs
    attention_tokens, mlp_tokens = [], []
    for block in range(shape.depth):
        for step in _at(steps, block, "pre"):
            present = step.after
        attention_tokens.append(present + prefix)
        for step in _at(steps, block, "mid"):
            present = step.after
        mlp_tokens.append(present + prefix)
        macs += block_macs(shape, attention_tokens[-1], mlp_tokens[-1])
    macs += sum(_stage_macs(shape, step, attention_tokens) for step in steps)
    last = present + prefix
    macs += shape.pool_macs + shape.pool_macs_per_token * last + shape.pool_macs_per_pair * last**2
    return Cost(macs, tuple(attention_tokens), tuple(mlp_tokens))


def block_macs(shape: ModelShape, attention_tokens: int, mlp_tokens: int) -> int:
    """MACs of one transformer block."""
    projections = (4 * shape.dim * shape.attention_dim + shape.gate_macs) * attention_tokens
    attention = 2 * shape.attention_dim * attention_tokens**2
    return projections + attention + shape.mlp_macs * mlp_tokens


def _at(steps: list[Step], block: int, place: str) -> list[Step]:
    return [step for step in steps if (step.stage.block, step.stage.at) == (block, place)]


def _stage_macs(shape: ModelShape, step: Step, attention_tokens: list[int]) -> int:
    # a score comes from an attention, and that attention saw its own number of tokens: at mid this block's,
    # at pre the one of the block before
    source = max(step.stage.block - (step.stage.at == "pre"), 0)
    reducing = REDUCERS[step.stage.reduce].macs(shape, step.before, step.kept)
    if step.stage.score == "none":
        return reducing
    return reducing + SCORERS[step.stage.score].macs(shape, attention_tokens[source])
