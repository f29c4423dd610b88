"""Reduce: tokens that do not stay become one extra token, weighted by their scores (EViT)."""

from __future__ import annotations

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.select import top_k


def masked(scene: MaskedInput) -> Joining:
    assert scene.stays_Bn is not None and scene.scores_Bn is not None
    return Joining(scene.stays_Bn, guest_share_Bn=scene.scores_Bn * (scene.present_Bn - scene.stays_Bn))


def fuse(scene: ReduceInput) -> Grouping:
    """Sum the others, each times its score, into one token appended at the end.

    The weights are the scores as they are, not renormalised (they sum to less than 1), as in EViT's code. At a later
    stage the fused token competes like any other.
    """
    assert scene.scores_Bn is not None
    kept_BK, guests_BG = top_k(scene.scores_Bn, scene.kept)
    return Grouping(kept_BK, guests_BG, guest_share_BG=scene.scores_Bn.gather(1, guests_BG))
