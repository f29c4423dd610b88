"""The parts of a ViT whose time is measured one by one: stem, halves of blocks, scores, verbs, head.

Blocks that read rotary positions get them as the input `rope`. It has rows for the prefix too, which are cut off, so
that all inputs of a graph have the same number of tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.models.parts import Part, example, sharing_copy
from prunesearch.models.step import Evidence, TokenState, mean_keys, take_step
from prunesearch.models.swap import ours
from prunesearch.models.transformer import Positions, attend
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
        tokens_BNC: Tensor = ours(self.model).stem(self.model, images)[0]
        return tokens_BNC


def _keywords(block: Any, rope: Tensor | None) -> dict[str, Tensor]:
    return {} if rope is None else {"rope": rope[..., block.attn.num_prefix_tokens :, :]}


class Blocks(nn.Module):
    """Some blocks, one after the other."""

    def __init__(self, blocks: Iterable[Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BNC: Tensor, rope: Tensor | None = None) -> Tensor:
        """Tokens to tokens."""
        block: Any
        for block in self.blocks:
            x_BNC = block(x_BNC, **_keywords(block, rope))
        return x_BNC


class Attentions(Blocks):
    """The attention halves of some blocks, one after the other."""

    def forward(self, x_BNC: Tensor, rope: Tensor | None = None) -> Tensor:
        """Tokens to tokens."""
        return self.attended(x_BNC, rope)

    def attended(self, x_BNC: Tensor, rope: Tensor | None, **given: Tensor) -> Tensor:
        """Tokens to tokens. given: more keywords of the attention."""
        block: Any
        for block in self.blocks:
            kind, keywords = ours(block), {**given, **_keywords(block, rope)}
            added_BNC = block.attn(kind.before_attention(block, x_BNC), **keywords)
            x_BNC = kind.after_attention(block, x_BNC, added_BNC)
        return x_BNC


class SizedAttentions(Attentions):
    """The attention halves of some blocks, when the sizes of tokens are added to the logits."""

    def forward(self, x_BNC: Tensor, bias_B11N: Tensor, rope: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Tokens to tokens."""
        return self.attended(x_BNC, rope, attn_mask=bias_B11N)


class Mlps(Blocks):
    """The MLP halves of some blocks, one after the other."""

    def forward(self, x_BNC: Tensor, rope: Tensor | None = None) -> Tensor:
        """Tokens to tokens."""
        for block in self.blocks:
            x_BNC = ours(block).mlp_half(block, x_BNC)
        return x_BNC


class Last(nn.Module):
    """What follows the blocks: norm, pooling, classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens to logits."""
        return self.model.forward_head(self.model.norm(x_BNC))


class Whole(Last):
    """All blocks and what follows them."""

    def forward(self, x_BNC: Tensor, rope: Tensor | None = None) -> Tensor:
        """Tokens to logits."""
        return super().forward(Blocks.forward(self.model, x_BNC, rope))


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
    """A verb that takes the tokens of a step from `before` to `kept`, and what their new places give to the blocks."""

    def __init__(self, step: Step, shape: ModelShape, positions: Positions | None) -> None:
        super().__init__()
        self.step, self.prefix, self.entry = step, shape.prefix_tokens, REDUCERS[step.stage.reduce]
        self.part = None if self.entry.part is None else self.entry.part(shape, step.kept)
        self.positions = positions

    def forward(self, x_BNC: Tensor, scores_Bn: Tensor, key_BHND: Tensor, size_Bn: Tensor) -> tuple[Tensor, ...]:
        """Tokens after the step, their sizes if the verb merges, and what their places give, if blocks read any."""
        scores = scores_Bn if self.entry.ranks else None
        keys_BnD = mean_keys(key_BHND, self.prefix) if self.entry.needs_keys else None
        state, positions = TokenState(x_BNC, size_Bn if self.entry.merges else None), self.positions
        if positions is not None:
            state = state._replace(place_Bn2=positions.grid_n2[: self.step.before].expand(x_BNC.shape[0], -1, -1))
        state, _ = take_step(self.step, state, self.prefix, Evidence(scores, keys_BnD), (), self.part)
        found = None if positions is None else positions.found(state.place_Bn2)
        return tuple(value for value in (state.tokens_BNC, state.size_Bn, found) if value is not None)


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
    attentions, sized = tuple(map(Attentions, chains)), tuple(map(SizedAttentions, chains))
    mlps, last, whole = tuple(map(Mlps, chains)), (Last(model),), (Whole(model),)
    blocks, positions, prefix = len(chains[0]), ours(model).positions(model), model.num_prefix_tokens
    parts: dict[str, dict[int, Part]] = defaultdict(dict)
    for tokens in counts:
        x_BNC = example(len(images), tokens, model.embed_dim, like=images)
        bias_B11N = example(len(images), 1, 1, tokens, like=images).abs()
        rope = _rope(positions, len(images), tokens - prefix, prefix)
        axis = () if not rope else (rope[0].ndim - 2,)
        parts["attention"][tokens] = Part(attentions, (x_BNC, *rope), blocks, _axes(1, *axis))
        parts["mlp"][tokens] = Part(mlps, (x_BNC,), blocks, _axes(1))
        if tokens in counts[::-SPARSE]:
            parts["sized_attention"][tokens] = Part(sized, (x_BNC, bias_B11N, *rope), blocks, _axes(1, 3, *axis))
        if tokens in (counts[0], counts[len(counts) // 2], counts[-1]):
            parts["whole"][tokens] = Part(whole, (x_BNC, *rope), 1, _axes(1, *axis))
        if tokens in (counts[0], counts[-1]):
            parts["last"][tokens] = Part(last, (x_BNC,), 1, _axes(1))
    return dict(parts)


def _axes(*axes: int) -> tuple[tuple[int, int], ...]:
    return tuple(enumerate(axes))


def _rope(positions: Positions | None, images: int, patches: int, prefix: int = 0) -> tuple[Tensor, ...]:
    """What a block of a pruned model gets by the places of its first patch tokens, after rows for the prefix; nothing
    if it reads no places."""
    if positions is None:
        return ()
    found = positions.found(positions.grid_n2[:patches].expand(images, -1, -1))
    return tuple(F.pad(rows, (0, 0, prefix, 0)) for rows in positions.keywords(0, found).values())


def score_part(model: Any, shape: ModelShape, images: Tensor, name: str, tokens: int) -> Part:
    """A score with its default options, for so many tokens, prefix included."""
    attention, positions = model.blocks[0].attn, ours(model).positions(model)
    x_BNC = example(len(images), tokens, shape.dim, like=images)
    rope = _rope(positions, len(images), tokens - shape.prefix_tokens)
    given: Any = {"rope": rope[0]} if rope else {}
    _, attended = attend(attention, x_BNC, None, shape, **given)
    tensors = (attended.query_BHND, attended.key_BHND, attended.value_BHND, attended.output_BHND)
    return Part((Score(name, shape, attention.scale).to(images.device).eval(),), (x_BNC, *tensors))


def verb_part(model: Any, shape: ModelShape, images: Tensor, step: Step) -> Part:
    """A verb with the options of its stage."""
    batch = len(images)
    x_BNC = example(batch, step.before + shape.prefix_tokens, shape.dim, like=images)
    heads = (batch, shape.heads, step.before + shape.prefix_tokens, shape.attention_dim // shape.heads)
    score_Bn = example(batch, step.before, like=images).float().softmax(dim=1)
    size_Bn = torch.ones(batch, step.before, device=images.device)
    inputs = (x_BNC, score_Bn, example(*heads, like=images), size_Bn)
    return Part((Verb(step, shape, ours(model).positions(model)).to(images.device).eval(),), inputs)


def piece_of(model: Any) -> nn.Module:
    """A copy of the model with only its first blocks, which is quick to measure whole. It shares the weights."""
    piece: Any = sharing_copy(model)
    piece.blocks = piece.blocks[:PIECE]
    return piece
