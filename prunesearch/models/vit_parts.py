"""The parts of a VisionTransformer whose time is measured one by one: stem, halves of blocks, scores, verbs, head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunesearch.models.parts import Part, example, sharing_copy
from prunesearch.models.step import Evidence, TokenState, mean_keys, take_step
from prunesearch.models.vision_transformer import attend, shape_of
from prunesearch.schedule import Step
from prunesearch.shape import ModelShape
from prunesearch.tokens.inputs import Attended, ScoreInput
from prunesearch.tokens.registry import REDUCERS, SCORERS

CHAIN = 2
"""Blocks that one call of a part runs."""
SPARSE = 2
"""Attention with sizes is measured at every second number of tokens."""
PIECE = 4
"""Blocks of a piece, see `piece_of`."""


class Stem(nn.Module):
    """Images to the tokens that the first block gets, (B, N, C)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) to tokens."""
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


class Attentions(nn.Module):
    """The attention halves of some blocks, one after the other."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BNC: Tensor, bias_B11N: Tensor | None = None) -> Tensor:
        """Tokens to tokens."""
        block: Any
        for block in self.blocks:
            x_BNC = x_BNC + block.drop_path1(block.ls1(block.attn(block.norm1(x_BNC), attn_mask=bias_B11N)))
        return x_BNC


class Mlps(nn.Module):
    """The MLP halves of some blocks, one after the other."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens to tokens."""
        block: Any
        for block in self.blocks:
            x_BNC = x_BNC + block.drop_path2(block.ls2(block.mlp(block.norm2(x_BNC))))
        return x_BNC


class Last(nn.Module):
    """What follows the blocks: norm, pooling, classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens to logits."""
        return self.model.forward_head(self.model.norm(x_BNC))


class Whole(nn.Module):
    """All blocks and what follows them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens to logits."""
        return self.model.forward_head(self.model.norm(self.model.blocks(x_BNC)))


class Score(nn.Module):
    """A score of the patch tokens, from what an attention layer has computed anyway."""

    def __init__(self, name: str, shape: ModelShape, scale: float) -> None:
        super().__init__()
        self.entry, self.shape, self.scale = SCORERS[name], shape, scale
        self.part = None if self.entry.part is None else self.entry.part(shape)

    def forward(
        self, x_BNC: Tensor, query_BHND: Tensor, key_BHND: Tensor, value_BHND: Tensor, output_BHND: Tensor
    ) -> Tensor:
        """Scores, (B, n)."""
        prefix, classes = self.shape.prefix_tokens, self.shape.class_tokens
        attended = Attended(query_BHND, key_BHND, value_BHND, output_BHND, None, self.scale, prefix, classes)
        scene = ScoreInput(x_BNC[:, prefix:], attended, 0, False, part=self.part)
        return self.entry.function(scene, **self.entry.options)


class Verb(nn.Module):
    """A verb that takes the tokens of a step from `before` to `kept`."""

    def __init__(self, step: Step, shape: ModelShape) -> None:
        super().__init__()
        self.step, self.prefix, self.entry = step, shape.prefix_tokens, REDUCERS[step.stage.reduce]
        self.part = None if self.entry.part is None else self.entry.part(shape, step.kept)

    def forward(self, x_BNC: Tensor, scores_Bn: Tensor, key_BHND: Tensor, size_Bn: Tensor) -> tuple[Tensor, ...]:
        """Tokens after the step, and their sizes if the verb merges."""
        scores = scores_Bn if self.entry.ranks else None
        keys_BnD = mean_keys(key_BHND, self.prefix) if self.entry.needs_keys else None
        state = TokenState(x_BNC, size_Bn if self.entry.merges else None)
        state, _ = take_step(self.step, state, self.prefix, Evidence(scores, keys_BnD), (), self.part)
        return (state.tokens_BNC,) if state.size_Bn is None else (state.tokens_BNC, state.size_Bn)


def stem_part(model: Any, images: Tensor) -> Part:
    """What runs before the first block."""
    return Part((Stem(model),), (images,))


def curve_parts(model: Any, images: Tensor, counts: Sequence[int]) -> dict[str, dict[int, Part]]:
    """The parts that depend on a number of tokens, by these numbers, prefix included.

    Names are those of fields of `profile.Profile`, and "whole": all blocks one after the other. Where a curve is nearly
    straight, or is a small part of the whole, fewer points are measured.
    """
    first = range(0, max(len(model.blocks) - CHAIN + 1, 1), CHAIN)
    chains = [model.blocks[place : place + CHAIN] for place in first]
    attentions, mlps, last = tuple(map(Attentions, chains)), tuple(map(Mlps, chains)), (Last(model),)
    whole = (Whole(model),)
    blocks = len(chains[0])
    parts: dict[str, dict[int, Part]] = defaultdict(dict)
    for tokens in counts:
        x_BNC = example(len(images), tokens, model.embed_dim, like=images)
        bias_B11N = example(len(images), 1, 1, tokens, like=images).abs()
        parts["attention"][tokens] = Part(attentions, (x_BNC,), blocks, ((0, 1),))
        parts["mlp"][tokens] = Part(mlps, (x_BNC,), blocks, ((0, 1),))
        if tokens in counts[::-SPARSE]:
            parts["sized_attention"][tokens] = Part(attentions, (x_BNC, bias_B11N), blocks, ((0, 1), (1, 3)))
        if tokens in (counts[0], counts[len(counts) // 2], counts[-1]):
            parts["whole"][tokens] = Part(whole, (x_BNC,), 1, ((0, 1),))
        if tokens in (counts[0], counts[-1]):
            parts["last"][tokens] = Part(last, (x_BNC,), 1, ((0, 1),))
    return dict(parts)


def score_part(model: Any, images: Tensor, name: str, tokens: int) -> Part:
    """A score with its default options, for so many tokens, prefix included."""
    shape, attention = shape_of(model), model.blocks[0].attn
    x_BNC = example(len(images), tokens, shape.dim, like=images)
    _, attended = attend(attention, x_BNC, None, shape)
    tensors = (attended.query_BHND, attended.key_BHND, attended.value_BHND, attended.output_BHND)
    return Part((Score(name, shape, attention.scale).to(images.device).eval(),), (x_BNC, *tensors))


def verb_part(model: Any, images: Tensor, step: Step) -> Part:
    """A verb with the options of its stage."""
    shape, batch = shape_of(model), len(images)
    x_BNC = example(batch, step.before + shape.prefix_tokens, shape.dim, like=images)
    heads = (batch, shape.heads, step.before + shape.prefix_tokens, shape.attention_dim // shape.heads)
    score_Bn = example(batch, step.before, like=images).float().softmax(dim=1)
    size_Bn = torch.ones(batch, step.before, device=images.device)
    inputs = (x_BNC, score_Bn, example(*heads, like=images), size_Bn)
    return Part((Verb(step, shape).to(images.device).eval(),), inputs)


def piece_of(model: Any) -> nn.Module:
    """A copy of the model with only its first blocks, which is quick to measure whole. It shares the weights."""
    piece: Any = sharing_copy(model)
    piece.blocks = nn.Sequential(*piece.blocks[:PIECE])
    return piece
