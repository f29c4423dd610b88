"""Reduce: the most similar pairs become one, whatever their importance (ToMe)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prunesearch.schedule import ModelShape
from prunesearch.tokens.registry import Grouping, ReduceInput, reducer


def _matching_macs(shape: ModelShape, before: int, kept: int) -> int:
    return (before // 2) * ((before + 1) // 2) * (shape.attention_dim // shape.heads)


def _half(present: int) -> int:
    return (present + 1) // 2


@reducer(
    "merge",
    source="ToMe (ICLR 2023, arXiv 2210.09461)",
    ranks=False,
    needs_keys=True,
    merges=True,
    fewest_kept=_half,
    macs=_matching_macs,
    options={"proportional_attention": True},
)
def merge(scene: ReduceInput, *, proportional_attention: bool) -> Grouping:
    """Match every second token to its most similar neighbour set and average the closest pairs, weighted by size.

    Bipartite matching on head-mean keys: patch tokens 1, 3, 5, ... look for a partner among 0, 2, 4, ...; the pairs
    with the highest cosine merge, so at most half of the tokens go in one stage. With proportional_attention later
    attention adds log(size) to its logits (the models does that; see `models`). Prefix tokens take no part.
    """
    keys_BnD, size_Bn = scene.keys_BnD, scene.size_Bn
    assert keys_BnD is not None and size_Bn is not None
    images, tokens, _ = keys_BnD.shape
    unit_BnD = F.normalize(keys_BnD.float(), dim=-1, eps=1e-6)
    cosine_BAP = unit_BnD[:, 1::2] @ unit_BnD[:, 0::2].transpose(1, 2)
    best_BA, partner_BA = cosine_BAP.max(dim=-1)
    order_BA = best_BA.sort(dim=1, descending=True, stable=True).indices
    merging_BG = order_BA[:, : tokens - scene.kept]
    guests_BG = 2 * merging_BG + 1
    is_guest_Bn = torch.zeros(images, tokens, dtype=torch.int64, device=keys_BnD.device).scatter(1, guests_BG, 1)
    # stable: tokens that stay come first, each group in image order
    kept_BK = is_guest_Bn.sort(dim=1, stable=True).indices[:, : scene.kept]
    slot_Bn = (1 - is_guest_Bn).cumsum(dim=1) - 1  # where a staying token ends up
    host_BG = slot_Bn.gather(1, 2 * partner_BA.gather(1, merging_BG))
    guest_size_BG = size_Bn.gather(1, guests_BG)
    own_size_BK = size_Bn.gather(1, kept_BK)
    total_BK = own_size_BK.scatter_add(1, host_BG, guest_size_BG)
    return Grouping(
        kept_BK,
        guests_BG,
        host_BG,
        guest_share_BG=guest_size_BG / total_BK.gather(1, host_BG),
        host_share_BK=own_size_BK / total_BK,
    )
