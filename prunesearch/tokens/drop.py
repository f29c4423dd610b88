"""Reduce: tokens that do not stay are removed (DynamicViT, AS-ViT, Top-K; EViT without fusion)."""

from __future__ import annotations

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.select import top_k


def masked(scene: MaskedInput) -> Joining:
    """`drop` for tokens that stay in their slots."""
    assert scene.stays_Bn is not None
    return Joining(scene.stays_Bn)


def drop(scene: ReduceInput) -> Grouping:
    """Remove the tokens that are not among the best."""
    assert scene.scores_Bn is not None
    kept_BK, _ = top_k(scene.scores_Bn, scene.kept)
    return Grouping(kept_BK)
