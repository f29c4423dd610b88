"""Reduce: each image drops its least important tokens or merges its most similar ones, as its scores suggest (PPT)."""

from __future__ import annotations

import torch

from prunesearch.tokens.inputs import Grouping, ReduceInput
from prunesearch.tokens.merge import closest_pairs
from prunesearch.tokens.select import ascending, ranked


def drop_or_merge(
    scene: ReduceInput, *, variance: float, proportional_attention: bool, parity: str, position: str, returns: str
) -> Grouping:
    """Merge as `merge` does where the scores are alike (their variance is below `variance`), else drop the lowest.

    Both remove the same number of tokens, so counts are equal for all images. variance: PPT uses 7e-5 without training
    and 6e-5 with fine-tuning, for 197 tokens and the score value_weighted. parity: see `merge`.
    """
    assert scene.scores_Bn is not None
    order_Bn = ranked(scene.scores_Bn)[1]
    pairs = closest_pairs(scene, parity)
    alike_B1 = scene.scores_Bn.var(dim=1, keepdim=True) < variance
    kept_BK = torch.where(alike_B1, pairs.others_BK, order_Bn[:, : scene.kept])
    guests_BG = torch.where(alike_B1, pairs.guests_BG, order_Bn[:, scene.kept :])
    host_BG = torch.where(alike_B1, pairs.host_BG, guests_BG)  # a guest that is its own host is dropped
    return Grouping(ascending(kept_BK)[0], guests_BG, host_BG, weight_Bn=scene.size_Bn)
