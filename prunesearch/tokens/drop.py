"""Reduce: tokens that do not stay are gone (DynamicViT, AS-ViT, Top-K; EViT without fusion)."""

from __future__ import annotations

from prunesearch.tokens.registry import Grouping, Joining, MaskedInput, ReduceInput, reducer
from prunesearch.tokens.select import top_k


def _masked(scene: MaskedInput) -> Joining:
    assert scene.stays_Bn is not None
    return Joining(scene.stays_Bn)


@reducer("drop", source="DynamicViT (NeurIPS 2021, arXiv 2106.02034)", masked=_masked, takes_threshold=True)
def drop(scene: ReduceInput) -> Grouping:
    """Remove the tokens that are not among the best."""
    assert scene.scores_Bn is not None
    kept_BK, _ = top_k(scene.scores_Bn, scene.kept)
    return Grouping(kept_BK)
