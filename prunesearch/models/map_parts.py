"""The parts of a Swin, Swin-V2 or ConvNeXt that are measured: MLPs of the third stage, scores, the choice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunesearch.models.feature_map import Choice, add_by_choice, choice_of
from prunesearch.models.map_shape import STAGE, stages_of
from prunesearch.models.parts import Part, example
from prunesearch.models.swap import ours
from prunesearch.schedule import Step
from prunesearch.shape import ModelShape
from prunesearch.tokens.inputs import ScoreInput
from prunesearch.tokens.registry import REDUCERS, SCORERS

CHAIN = 2
"""Blocks that one call of a part runs."""


class Mlps(nn.Module):
    """The MLPs of some blocks, one after the other, for all positions or with some of them held."""

    def __init__(self, blocks: Sequence[Any], shape: ModelShape, verb: str | None, kept: int) -> None:
        super().__init__()
        self.blocks, self.kept = nn.ModuleList(blocks), kept
        make = None if verb is None else REDUCERS[verb].part
        self.paths = nn.ModuleList([] if make is None else [make(shape, kept) for _ in blocks])

    def forward(self, x_BnC: Tensor, order_Bn: Tensor, back_Bn: Tensor) -> Tensor:
        """Positions to positions."""
        for index, block in enumerate(self.blocks):
            mlp = partial(ours(block).slow, block)
            if self.paths:
                choice = Choice(None, order_Bn, back_Bn, self.kept)
                x_BnC = x_BnC + add_by_choice(x_BnC, choice, mlp, self.paths[index])
            else:
                x_BnC = x_BnC + mlp(x_BnC)
        return x_BnC


class Score(nn.Module):
    """A score of the positions."""

    def __init__(self, name: str, shape: ModelShape) -> None:
        super().__init__()
        self.entry = SCORERS[name]
        self.part = None if self.entry.part is None else self.entry.part(shape)

    def forward(self, x_BnC: Tensor) -> Tensor:
        """Scores, (B, n)."""
        scene = ScoreInput(x_BnC, None, 0, False, part=self.part)
        return self.entry.function(scene, **self.entry.options)


class Verb(nn.Module):
    """The choice of the positions that go through the MLP."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x_BnC: Tensor, scores_Bn: Tensor) -> tuple[Tensor, ...]:
        """Their order, and its inverse."""
        choice = choice_of(self.step, x_BnC, scores_Bn)
        assert choice.order_Bn is not None and choice.back_Bn is not None
        return choice.order_Bn, choice.back_Bn


def stem_part(model: Any, images: Tensor) -> Part | None:
    """None: what does not depend on the positions that are held is the rest of the model."""
    return None


def curve_parts(model: Any, shape: ModelShape, images: Tensor, counts: Sequence[int]) -> dict[str, dict[int, Part]]:
    """The MLP of a block, for each number of positions that go through it. With all of them none are held."""
    stage = stages_of(model)[STAGE]
    blocks: Any = stage.blocks
    holding = next(name for name, entry in REDUCERS.items() if entry.holds)
    x_BnC = example(len(images), shape.patch_tokens, shape.dim, like=images)
    order_Bn = x_BnC[..., 0].argsort(dim=1)
    inputs = (x_BnC, order_Bn, order_Bn.argsort(dim=1))
    chains = [blocks[place : place + CHAIN] for place in range(0, max(len(blocks) - CHAIN + 1, 1), CHAIN)]
    parts = {}
    for tokens in counts:
        verb = holding if tokens < shape.patch_tokens else None
        modules = tuple(Mlps(chain, shape, verb, tokens).to(images.device).eval() for chain in chains)
        parts[tokens] = Part(modules, inputs, len(chains[0]))
    return {"mlp": parts}


def score_part(model: Any, shape: ModelShape, images: Tensor, name: str, tokens: int) -> Part:
    """A score with its default options."""
    x_BnC = example(len(images), tokens, shape.dim, like=images)
    return Part((Score(name, shape).to(images.device).eval(),), (x_BnC,))


def verb_part(model: Any, shape: ModelShape, images: Tensor, step: Step) -> Part:
    """The verb that holds, with the options of its stage."""
    x_BnC = example(len(images), step.before, shape.dim, like=images)
    return Part((Verb(step),), (x_BnC, x_BnC[..., 0].float().softmax(dim=1)))


def piece_of(model: Any) -> nn.Module:
    """The model itself: its third stage is the larger part of it."""
    return model
