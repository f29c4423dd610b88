"""Reduce: the others keep their place and take a linear path instead of the MLP (dynamic spatial sparsification).

That is what `hold` does in a model with a feature map. In other models it is `drop`, or `fuse`, until the next stage:
see `on_tokens` of its entry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunesearch.shape import ModelShape
from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.select import top_k

LAYER_SCALE = 1e-6
"""Initial layer scale of a fast path, in models with layer scales: ConvNeXt's own initial value."""


class FastPath(nn.Module):
    """LayerNorm, a linear layer C -> C, and a layer scale in models that have them."""

    def __init__(self, dim: int, layer_scale: bool, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.linear = nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE)) if layer_scale else None
        # the initialisation of Swin and ConvNeXt
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, held_BGC: Tensor) -> Tensor:
        """Tokens (B, G, C) to what the block adds to them, (B, G, C)."""
        added_BGC = self.linear(self.norm(held_BGC.to(self.norm.weight.dtype)))
        return added_BGC if self.gamma is None else added_BGC * self.gamma


def masked(scene: MaskedInput, *, representative: bool) -> Joining:
    """`hold` for tokens that stay in their slots."""
    assert scene.stays_Bn is not None
    return Joining(scene.stays_Bn)


def part(shape: ModelShape, kept: int) -> FastPath:
    """The learned module of one block. Every block from this stage to the next one has its own."""
    return FastPath(shape.dim, shape.layer_scale, shape.norm_eps)


def hold(scene: ReduceInput, *, representative: bool) -> Grouping:
    """The others wait until the next stage: outside the blocks (ViT), or by a linear path (Swin, ConvNeXt).

    Then it chooses among all again. The path is learned, and stands for the MLP.
    """
    assert scene.scores_Bn is not None
    return Grouping(*top_k(scene.scores_Bn, scene.kept))
