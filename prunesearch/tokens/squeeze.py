"""Reduce: every token that does not stay is squeezed into the kept token most similar to it (TPS)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.select import top_k


def nearest_staying(scene: MaskedInput) -> tuple[Tensor, Tensor, Tensor]:
    """For each slot the most similar other token that stays: cosine, slot; and 1 for guests, with gradients.

    A token is never its own host: the gradient to its stay says what happens if it joins another. One that has no
    other to join (it alone stays) is no guest, whose cosine is 0.
    """
    assert scene.stays_Bn is not None
    unit_BnC = F.normalize(scene.patches_BnC.float(), dim=-1, eps=1e-6)
    cosine_Bnn = unit_BnC @ unit_BnC.transpose(1, 2)
    itself_nn = torch.eye(cosine_Bnn.shape[-1], dtype=torch.bool, device=cosine_Bnn.device)
    hosts_Bnn = (scene.stays_Bn[:, None] > 0) & ~itself_nn
    cosine_Bn, host_Bn = cosine_Bnn.masked_fill(~hosts_Bnn, -torch.inf).max(dim=-1)
    hosted_Bn = hosts_Bnn.any(dim=-1)
    return cosine_Bn.masked_fill(~hosted_Bn, 0.0), host_Bn, (scene.present_Bn - scene.stays_Bn) * hosted_Bn


def masked(scene: MaskedInput, *, temperature: float) -> Joining:
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


def squeeze(scene: ReduceInput, *, temperature: float) -> Grouping:
    """Mix each of the others into its most similar kept token, by exp(cosine / temperature) against e for the host.

    Similarity is the cosine of block features. A token has one host; a host without guests is unchanged.
    """
    assert scene.scores_Bn is not None
    kept_BK, guests_BG = top_k(scene.scores_Bn, scene.kept)
    unit_BnC = F.normalize(scene.patches_BnC.float(), dim=-1, eps=1e-6)
    index = (-1, -1, unit_BnC.shape[-1])
    hosts_BKC = unit_BnC.gather(1, kept_BK[..., None].expand(index))
    guests_BGC = unit_BnC.gather(1, guests_BG[..., None].expand(index))
    # the first of equal maxima, so that a guest never has two hosts
    cosine_BG, host_BG = (guests_BGC @ hosts_BKC.transpose(1, 2)).max(dim=-1)
    guest_weight_BG = (cosine_BG / temperature).exp()
    own_weight = math.e  # exp(cos(x, x)); the temperature does not touch it, as in the released code
    total_BK = torch.full_like(kept_BK, own_weight, dtype=torch.float32).scatter_add(1, host_BG, guest_weight_BG)
    return Grouping(
        kept_BK,
        guests_BG,
        host_BG,
        guest_share_BG=guest_weight_BG / total_BK.gather(1, host_BG),
        host_share_BK=own_weight / total_BK,
    )
