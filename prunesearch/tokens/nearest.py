"""For each token that does not stay, the most similar one that stays, by the cosine of block features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prunesearch.tokens.inputs import MaskedInput, ReduceInput
from prunesearch.tokens.select import top_k


def nearest_kept(scene: ReduceInput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the tokens that stay (B, K) and of the others (B, G), and for each of the others the cosine (B, G)
    with its most similar kept token and the place (B, G) of that token among the kept."""
    assert scene.scores_Bn is not None
    kept_BK, guests_BG = top_k(scene.scores_Bn, scene.kept)
    unit_BnC = F.normalize(scene.patches_BnC.float(), dim=-1, eps=1e-6)
    index = (-1, -1, unit_BnC.shape[-1])
    hosts_BKC = unit_BnC.gather(1, kept_BK[..., None].expand(index))
    guests_BGC = unit_BnC.gather(1, guests_BG[..., None].expand(index))
    # the first of equal maxima, so that a guest never has two hosts
    cosine_BG, host_BG = (guests_BGC @ hosts_BKC.transpose(1, 2)).max(dim=-1)
    return kept_BK, guests_BG, cosine_BG, host_BG


def nearest_staying(scene: MaskedInput) -> tuple[Tensor, Tensor, Tensor]:
    """For each slot: the cosine with the most similar other token that stays, the slot of that token, and 1 for guests
    (with gradients).

    A token is never its own host, because its gradient must tell what happens if it joins another token. A token that
    has no other token to join is not a guest, and its cosine is 0.
    """
    assert scene.stays_Bn is not None
    unit_BnC = F.normalize(scene.patches_BnC.float(), dim=-1, eps=1e-6)
    cosine_Bnn = unit_BnC @ unit_BnC.transpose(1, 2)
    itself_nn = torch.eye(cosine_Bnn.shape[-1], dtype=torch.bool, device=cosine_Bnn.device)
    hosts_Bnn = (scene.stays_Bn[:, None] > 0) & ~itself_nn
    cosine_Bn, host_Bn = cosine_Bnn.masked_fill(~hosts_Bnn, -torch.inf).max(dim=-1)
    hosted_Bn = hosts_Bnn.any(dim=-1)
    return cosine_Bn.masked_fill(~hosted_Bn, 0.0), host_Bn, (scene.present_Bn - scene.stays_Bn) * hosted_Bn
