"""Reduce: each image drops its least important tokens or merges its most similar ones, as its scores suggest (PPT)."""

from __future__ import annotations

import torch

from prunesearch.tokens.inputs import Grouping, ReduceInput
from prunesearch.tokens.merge import merge
from prunesearch.tokens.select import top_k


def drop_or_merge(scene: ReduceInput, *, variance: float, proportional_attention: bool, parity: str) -> Grouping:
    """Merge as `merge` does where the scores are alike (their variance is below `variance`), else drop the lowest.

    Both remove the same number of tokens, so counts are equal for all images. variance: PPT uses 7e-5 without training
    and 6e-5 with fine-tuning, for 197 tokens and the score value_weighted. parity: see `merge`.
    """
    assert scene.scores_Bn is not None
    kept_BK, guests_BG = top_k(scene.scores_Bn, scene.kept)
    merged = merge(scene, proportional_attention=proportional_attention, parity=parity)
    assert isinstance(merged, Grouping) and merged.guests_BG is not None
    alike_B1 = scene.scores_Bn.var(dim=1, keepdim=True) < variance
    # a guest of weight and size 0 is dropped, whatever its host
    share_BG = alike_B1.expand_as(guests_BG)
    return Grouping(
        torch.where(alike_B1, merged.kept_BK, kept_BK),
        torch.where(alike_B1, merged.guests_BG, guests_BG),
        merged.host_BG,
        guest_weight_BG=share_BG if merged.guest_weight_BG is None else merged.guest_weight_BG * share_BG,
        size_share_BG=share_BG,
    )
