"""Reduce: every token that does not stay is mixed into the kept token most similar to it (TPS)."""

from __future__ import annotations

import math

import torch

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.nearest import nearest_kept, nearest_staying


def masked(scene: MaskedInput, *, temperature: float, position: str, returns: str) -> Joining:
    """`squeeze` for tokens that stay in their slots."""
    assert scene.stays_Bn is not None
    cosine_Bn, host_Bn, guest_Bn = nearest_staying(scene)
    guest_weight_Bn = (cosine_Bn / temperature).exp() * guest_Bn
    own_weight = math.e
    total_Bn = torch.full_like(guest_weight_Bn, own_weight).scatter_add(1, host_Bn, guest_weight_Bn)
    return Joining(
        scene.stays_Bn,
        guest_share_Bn=guest_weight_Bn / total_Bn.gather(1, host_Bn),
        host_Bn=host_Bn,
        host_share_Bn=own_weight / total_Bn,
    )


def squeeze(scene: ReduceInput, *, temperature: float, position: str, returns: str) -> Grouping:
    """Mix each of the others into its most similar kept token, by exp(cosine / temperature) against e for the host.

    Similarity is the cosine of block features. A token has one host; a host without guests is unchanged.
    """
    near = nearest_kept(scene)
    logit_BG = near.cosine_BG if temperature == 1 else near.cosine_BG / temperature
    return Grouping(
        near.kept_BK,
        near.guests_BG,
        near.host_BG,
        logit_BG.exp(),
        ordered_BnC=near.ordered_BnC,
        own_weight=math.e,  # the host's logit is cos(x, x) = 1, without the temperature, as in the released code
    )
