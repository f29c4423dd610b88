"""A bias for each pair of tokens, by their places in the image (BEiT), that travels with its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunesearch.models.places import grid_places, nearest_index
from prunesearch.models.swap import ours
from prunesearch.models.transformer import AttendingAttention


class PairBias:
    """The places of the image for which the tokens of one pass stand.

    given: keywords of the blocks, as timm calls them. A token between places counts as at the nearest one.
    """

    in_attention = True

    def __init__(self, height: int, width: int, prefix: int, device: torch.device, given: dict[str, Any]) -> None:
        self.height, self.width, self.prefix, self.given = height, width, prefix, given
        self.grid_n2 = grid_places(height, width, device)

    def found(self, place_Bn2: Tensor | None) -> Tensor | None:
        """The token of the dense model at whose place each token counts, prefix included, (B, N)."""
        if place_Bn2 is None:
            return None
        prefix_BP = torch.arange(self.prefix, device=place_Bn2.device).expand(place_Bn2.shape[0], -1)
        near_Bn = nearest_index(place_Bn2, self.height, self.width)
        return torch.cat([prefix_BP, near_Bn + self.prefix], dim=1)

    def keywords(self, index: int, found: Tensor | None) -> dict[str, Any]:
        """The keywords of a block."""
        return self.given


class BiasedAttention(AttendingAttention):
    """An attention of timm that adds a bias for each pair of tokens."""

    def pair_bias(self: Any, given: Mapping[str, Any]) -> Tensor | None:
        """The bias that timm adds, (1, H, N, N) for all tokens of the image. given: the keywords of the forward."""
        raise NotImplementedError

    def bias_of(self: Any, given: Mapping[str, Any], found: Tensor | None) -> Tensor | None:
        """The rows and columns of the tokens that are there, and the mask."""
        bias, mask = ours(self).pair_bias(self, given), given.get("attn_mask")
        if bias is None:
            return mask
        if found is not None:
            pair_BNN = found[:, :, None] * bias.shape[-1] + found[:, None, :]
            pairs = bias[0].flatten(1).index_select(1, pair_BNN.flatten())
            bias = pairs.unflatten(1, pair_BNN.shape).transpose(0, 1)
        return bias if mask is None else bias + mask
