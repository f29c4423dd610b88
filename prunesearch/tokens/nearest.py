"""For each token that does not stay, the most similar one that stays, by the cosine of block features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunesearch.tokens.inputs import MaskedInput, ReduceInput
from prunesearch.tokens.select import gather, top_k, unit


class Nearest(NamedTuple):
    """The tokens that stay (B, K) and the others (B, G), as `top_k` gives them; the features of both, one after the
    other; and for each of the others the cosine with its most similar kept token, and the place of that token among
    the kept."""

    kept_BK: Tensor
    guests_BG: Tensor
    ordered_BnC: Tensor
    cosine_BG: Tensor
    host_BG: Tensor


def nearest_kept(scene: ReduceInput) -> Nearest:
    """For each token that does not stay, its most similar kept token."""
    assert scene.scores_Bn is not None
    kept_BK, guests_BG = top_k(scene.scores_Bn, scene.kept)
    ordered_BnC = gather(scene.patches_BnC, torch.cat([kept_BK, guests_BG], dim=1))
    unit_BnC = unit(ordered_BnC)
    cosine_BGK = torch.bmm(unit_BnC[:, scene.kept :], unit_BnC[:, : scene.kept].transpose(1, 2))
    # the first of equal maxima, so that a guest never has two hosts
    return Nearest(kept_BK, guests_BG, ordered_BnC, *cosine_BGK.max(dim=-1))


def nearest_staying(scene: MaskedInput) -> tuple[Tensor, Tensor, Tensor]:
    """For each slot: the cosine with the most similar other token that stays, the slot of that token, and 1 for guests
    (with gradients).

    A token is never its own host, because its gradient must tell what happens if it joins another token. A token that
    has no other token to join is not a guest, and its cosine is 0.
    """
    assert scene.stays_Bn is not None
    unit_BnC = unit(scene.patches_BnC)
    cosine_Bnn = unit_BnC @ unit_BnC.transpose(1, 2)
    itself_nn = torch.eye(cosine_Bnn.shape[-1], dtype=torch.bool, device=cosine_Bnn.device)
    hosts_Bnn = (scene.stays_Bn[:, None] > 0) & ~itself_nn
    cosine_Bn, host_Bn = cosine_Bnn.masked_fill(~hosts_Bnn, -torch.inf).max(dim=-1)
    hosted_Bn = hosts_Bnn.any(dim=-1)
    return cosine_Bn.masked_fill(~hosted_Bn, 0.0), host_Bn, (scene.present_Bn - scene.stays_Bn) * hosted_Bn
