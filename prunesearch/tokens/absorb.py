"""Reduce: every token that does not stay is averaged into the kept token most similar to it (DiffRate's merging)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.select import top_k
from prunesearch.tokens.squeeze import nearest_staying


def masked(scene: MaskedInput, *, proportional_attention: bool) -> Joining:
    assert scene.stays_Bn is not None
    cosine_Bn, host_Bn, guest_Bn = nearest_staying(scene)
    total_Bn = torch.ones_like(guest_Bn).scatter_add(1, host_Bn, guest_Bn)
    return Joining(
        scene.stays_Bn,
        guest_share_Bn=guest_Bn / total_Bn.gather(1, host_Bn),
        host_Bn=host_Bn,
        host_share_Bn=1 / total_Bn,
        size_share_Bn=cosine_Bn.clamp_min(0) * guest_Bn,
    )


def absorb(scene: ReduceInput, *, proportional_attention: bool) -> Grouping:
    """Average each of the others into its most similar kept token (plain mean), whose size grows by cosine x size.

    Similarity is the cosine of block features. Negative cosines add nothing to a size; in the released code sizes can
    fall below zero there, and their logarithm with them. With proportional_attention later attention adds log(size).
    """
    assert scene.scores_Bn is not None
    kept_BK, guests_BG = top_k(scene.scores_Bn, scene.kept)
    unit_BnC = F.normalize(scene.patches_BnC.float(), dim=-1, eps=1e-6)
    index = (-1, -1, unit_BnC.shape[-1])
    hosts_BKC = unit_BnC.gather(1, kept_BK[..., None].expand(index))
    guests_BGC = unit_BnC.gather(1, guests_BG[..., None].expand(index))
    cosine_BG, host_BG = (guests_BGC @ hosts_BKC.transpose(1, 2)).max(dim=-1)
    total_BK = torch.ones_like(kept_BK, dtype=torch.float32).scatter_add(1, host_BG, torch.ones_like(cosine_BG))
    return Grouping(
        kept_BK,
        guests_BG,
        host_BG,
        guest_share_BG=1 / total_BK.gather(1, host_BG),
        host_share_BK=1 / total_BK,
        size_share_BG=cosine_BG.clamp_min(0),
    )
