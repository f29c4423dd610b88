"""The parts of a ViT whose time is measured one by one: stem, halves of blocks, scores, verbs, head.

Blocks that read where their tokens are get what `Positions.found` gives as the input `found`, but for the dense model.
It has a row for each token, prefix included, so that all inputs of a graph have the same number; rows that it has not
are cut off inside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunesearch.models.parts import Part, example, sharing_copy
from prunesearch.models.step import Evidence, TokenState, mean_keys, returned, take_step
from prunesearch.models.swap import ours
from prunesearch.models.transformer import Positions, attend
from prunesearch.schedule import Step
from prunesearch.shape import ModelShape
from prunesearch.tokens.inputs import Attended, ScoreInput
from prunesearch.tokens.registry import SCORERS

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


class Halves(nn.Module):
    """Halves of some blocks, one after the other."""

    which: ClassVar[str]

    def __init__(self, blocks: Iterable[Any], shape: ModelShape, positions: Positions | None, pad: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.shape, self.positions, self.pad = shape, positions, pad

    def forward(self, x_BNC: Tensor, found: Tensor | None = None) -> Tensor:
        """Tokens to tokens."""
        return self.run(x_BNC, found, None)

    def run(self, x_BNC: Tensor, found: Tensor | None, bias_B11N: Tensor | None) -> Tensor:
        """Tokens to tokens. bias_B11N: what sizes of tokens add to the logits."""
        found = None if found is None else found.narrow(_axis(found), self.pad, found.shape[_axis(found)] - self.pad)
        for index, block in enumerate(self.blocks):
            if type(self).which == "attention":
                x_BNC = self._attention_half(index, block, x_BNC, found, bias_B11N)
            else:
                x_BNC = ours(block).mlp_half(block, x_BNC)
        return x_BNC

    def _attention_half(
        self, index: int, block: Any, x_BNC: Tensor, found: Tensor | None, bias_B11N: Tensor | None
    ) -> Tensor:
        kind, attention, positions = ours(block), block.attn, self.positions
        given: dict[str, Any] = {} if bias_B11N is None else {"attn_mask": bias_B11N}
        given |= {} if positions is None else positions.keywords(index, found)
        before_BNC = kind.before_attention(block, x_BNC)
        if positions is not None and positions.in_attention:
            bias = ours(attention).bias_of(attention, given, found)
            added_BNC, _ = attend(attention, before_BNC, bias, self.shape, **given)
        else:
            added_BNC = attention(before_BNC, **given)
        return kind.after_attention(block, x_BNC, added_BNC)


class Attentions(Halves):
    """The attention halves of some blocks."""

    which = "attention"


class SizedAttentions(Attentions):
    """The attention halves of some blocks, when the sizes of tokens are added to the logits."""

    def forward(self, x_BNC: Tensor, bias_B11N: Tensor, found: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Tokens to tokens."""
        return self.run(x_BNC, found, bias_B11N)


class Mlps(Halves):
    """The MLP halves of some blocks."""

    which = "mlp"


class Last(nn.Module):
    """What follows the blocks: norm, pooling, classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Tokens to logits."""
        return self.model.forward_head(self.model.norm(x_BNC))


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
    """A verb that takes the tokens of a step from `before` to `kept`, and what their new places give to the blocks.

    With `until`, those that left are back at once.
    """

    def __init__(self, step: Step, shape: ModelShape, positions: Positions | None) -> None:
        super().__init__()
        self.step, self.prefix, self.entry = step, shape.prefix_tokens, step.verb
        self.part = None if self.entry.part is None else self.entry.part(shape, step.kept)
        self.positions = positions

    def forward(self, x_BNC: Tensor, scores_Bn: Tensor, key_BHND: Tensor, size_Bn: Tensor) -> tuple[Tensor, ...]:
        """Tokens after the step, their sizes if the verb merges, what their places give, if blocks read any, and the
        tokens when all are back, if they come back."""
        scores = scores_Bn if self.entry.ranks else None
        keys_BnD = mean_keys(key_BHND, self.prefix) if self.entry.needs_keys else None
        state, positions = TokenState(x_BNC, size_Bn if self.entry.merges else None), self.positions
        if positions is not None:
            state = state._replace(place_Bn2=positions.grid_n2[: self.step.before].expand(x_BNC.shape[0], -1, -1))
        state, _ = take_step(self.step, state, self.prefix, Evidence(scores, keys_BnD), (), self.part)
        found = None if positions is None else positions.found(state.place_Bn2)
        back_BNC = returned(state, self.prefix).tokens_BNC if state.away else None
        return tuple(value for value in (state.tokens_BNC, state.size_Bn, found, back_BNC) if value is not None)


def stem_part(model: Any, images: Tensor) -> Part:
    """What runs before the first block."""
    return Part((Stem(model),), (images,))


def curve_parts(model: Any, shape: ModelShape, images: Tensor, counts: Sequence[int]) -> dict[str, dict[int, Part]]:
    """The parts that depend on a number of tokens, by these numbers, prefix included.

    Names are those of fields of `profile.Profile`. Where a curve is nearly straight, or is a small part of the whole,
    fewer points are measured.
    """
    positions, first = ours(model).positions(model), range(0, max(len(model.blocks) - CHAIN + 1, 1), CHAIN)
    known = _found(positions, len(images), 1)
    pad = shape.prefix_tokens if known is not None and known.shape[_axis(known)] == 1 else 0
    chains = [model.blocks[place : place + CHAIN] for place in first]

    def made() -> tuple[tuple[nn.Module, ...], ...]:
        kinds = (Attentions, SizedAttentions, Mlps)
        return tuple(tuple(kind(chain, shape, positions, pad) for chain in chains) for kind in kinds)

    pruned = made()
    dense = pruned if positions is None else made()  # it looks nothing up, so its graph is another
    last, blocks = (Last(model),), len(chains[0])
    parts: dict[str, dict[int, Part]] = defaultdict(dict)
    for tokens in counts:
        x_BNC = example(len(images), tokens, model.embed_dim, like=images)
        bias_B11N = example(len(images), 1, 1, tokens, like=images).abs()
        is_dense = tokens == shape.patch_tokens + shape.prefix_tokens
        attentions, sized, _ = dense if is_dense else pruned
        found = None if is_dense else _found(positions, len(images), tokens - shape.prefix_tokens)
        places = () if found is None else (_padded(found, pad),)
        axes = () if found is None else (_axis(found),)
        parts["attention"][tokens] = Part(attentions, (x_BNC, *places), blocks, _axes(1, *axes))
        parts["mlp"][tokens] = Part(pruned[2], (x_BNC,), blocks, _axes(1))
        if tokens in counts[::-SPARSE]:
            parts["sized_attention"][tokens] = Part(sized, (x_BNC, bias_B11N, *places), blocks, _axes(1, 3, *axes))
        if tokens in (counts[0], counts[-1]):
            if shape.segments:  # all tokens are back there
                x_BNC = example(len(images), shape.patch_tokens + shape.prefix_tokens, model.embed_dim, like=images)
            parts["last"][tokens] = Part(last, (x_BNC,), 1, () if shape.segments else _axes(1))
    return dict(parts)


def _axes(*axes: int) -> tuple[tuple[int, int], ...]:
    return tuple(enumerate(axes))


def _axis(found: Tensor) -> int:
    """The axis of tokens: rows of a table have one for heads before it."""
    return 2 if found.ndim == 4 else 1


def _found(positions: Positions | None, images: int, patches: int) -> Tensor | None:
    """What the blocks of a pruned model look up for its first patch tokens; None if they read no places."""
    return None if positions is None else positions.found(positions.grid_n2[:patches].expand(images, -1, -1))


def _padded(found: Tensor, pad: int) -> Tensor:
    """With rows for the prefix."""
    shape = list(found.shape)
    shape[_axis(found)] = pad
    return torch.cat([found.new_zeros(shape), found], dim=_axis(found))


def score_part(model: Any, shape: ModelShape, images: Tensor, name: str, tokens: int) -> Part:
    """A score with its default options, for so many tokens, prefix included."""
    attention, positions = model.blocks[0].attn, ours(model).positions(model)
    x_BNC = example(len(images), tokens, shape.dim, like=images)
    found = _found(positions, len(images), tokens - shape.prefix_tokens)
    given = {} if positions is None else positions.keywords(0, found)
    bias = ours(attention).bias_of(attention, given, found)
    _, attended = attend(attention, x_BNC, bias, shape, **given)
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
