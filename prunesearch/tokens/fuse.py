"""Reduce: tokens that do not stay become one extra token, weighted by their scores (EViT)."""

from __future__ import annotations

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.select import top_k_and_rest


def masked(scene: MaskedInput, *, returns: str) -> Joining:
    """`fuse` for tokens that stay in their slots."""
    assert scene.stays_Bn is not None and scene.scores_Bn is not None
    return Joining(scene.stays_Bn, guest_share_Bn=scene.scores_Bn * (scene.present_Bn - scene.stays_Bn))


def fuse(scene: ReduceInput, *, returns: str) -> Grouping:
    """Sum the others, each times its score, into one token appended at the end.

    The scores are used as weights without renormalising (they sum to less than 1), as in EViT's code. Later stages
    treat the fused token like any other token.
    """
    assert scene.scores_Bn is not None
    kept_BK, guests_BG, weight_BG = top_k_and_rest(scene.scores_Bn, scene.kept)
    return Grouping(kept_BK, guests_BG, guest_weight_BG=weight_BG)
