"""Reduce: learned queries attend over the tokens and produce new ones (PatchMerger)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunesearch.shape import ModelShape
from prunesearch.tokens.inputs import MaskedInput, Pooled, ReduceInput


class Queries(nn.Module):
    """LayerNorm and K learned queries, initialised from a standard normal distribution."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.queries_KC = nn.Parameter(torch.randn(count, dim))

    def forward(self, patches_BnC: Tensor, present_Bn: Tensor | None, scaled: bool) -> Tensor:
        """Tokens (B, n, C) to new ones (B, K, C): softmax over tokens of (queries x normed), times normed."""
        normed_BnC = self.norm(patches_BnC.to(self.queries_KC.dtype))
        scale = patches_BnC.shape[-1] ** -0.5 if scaled else 1.0
        logits_BKn = (self.queries_KC * scale) @ normed_BnC.transpose(1, 2)
        if present_Bn is not None:
            logits_BKn = logits_BKn.masked_fill(present_Bn[:, None] == 0, -torch.inf)
        return logits_BKn.softmax(dim=-1) @ normed_BnC


def masked(scene: MaskedInput, *, scaled: bool) -> Pooled:
    """`pool` for tokens that stay in their slots; empty slots are ignored."""
    assert scene.part is not None
    return Pooled(scene.part(scene.patches_BnC, scene.present_Bn, scaled))


def part(shape: ModelShape, kept: int) -> Queries:
    """The learned module of one stage."""
    return Queries(shape.dim, kept)


def pool(scene: ReduceInput, *, scaled: bool) -> Pooled:
    """Replace all patch tokens by as many as asked for, each a learned query's mixture of the normalised tokens.

    scaled: divide the logits by sqrt(C), as in vit-pytorch. Other code does not, and the paper does not say. Prefix
    tokens are not pooled. The new tokens have no position in the image.
    """
    assert scene.part is not None
    return Pooled(scene.part(scene.patches_BnC, None, scaled))
