"""Reduce: every token that does not stay is averaged into the kept token most similar to it (DiffRate's merging)."""

from __future__ import annotations

import torch

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.nearest import nearest_kept, nearest_staying


def masked(scene: MaskedInput, *, proportional_attention: bool, position: str, returns: str) -> Joining:
    """`absorb` for tokens that stay in their slots."""
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


def absorb(scene: ReduceInput, *, proportional_attention: bool, position: str, returns: str) -> Grouping:
    """Average each of the others into its most similar kept token (plain mean), whose size grows by cosine x size.

    Similarity is the cosine of block features. Negative cosines add nothing to a size. In the released code they make
    sizes negative, which have no logarithm. proportional_attention: later attention layers add log(size) to the logits
    (models/transformer.py does this).
    """
    near = nearest_kept(scene)
    share_BG = near.cosine_BG.clamp_min(0)
    return Grouping(near.kept_BK, near.guests_BG, near.host_BG, size_share_BG=share_BG, ordered_BnC=near.ordered_BnC)
