"""Reduce: tokens that do not stay become one extra token, weighted by their scores (EViT)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.select import top_k_and_rest


def masked(scene: MaskedInput, *, normalised: bool, returns: str) -> Joining:
    """`fuse` for tokens that stay in their slots."""
    assert scene.stays_Bn is not None and scene.scores_Bn is not None
    weight_Bn = scene.scores_Bn * (scene.present_Bn - scene.stays_Bn)
    return Joining(scene.stays_Bn, guest_share_Bn=_shares(weight_Bn) if normalised else weight_Bn)


def fuse(scene: ReduceInput, *, normalised: bool, returns: str) -> Grouping:
    """Sum the others, each times its score, into one token appended at the end.

    The scores are used as weights as they are (they sum to less than 1), as in EViT's code. normalised: divided by
    their sum, as in Evo-ViT's. Later stages treat the fused token like any other token.
    """
    assert scene.scores_Bn is not None
    kept_BK, guests_BG, weight_BG = top_k_and_rest(scene.scores_Bn, scene.kept)
    return Grouping(kept_BK, guests_BG, guest_weight_BG=_shares(weight_BG) if normalised else weight_BG)


def _shares(weight_Bn: Tensor) -> Tensor:
    """The weights divided by their sum. All 0 where that is 0."""
    return weight_Bn / weight_Bn.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
