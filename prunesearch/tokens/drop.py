"""Reduce: tokens that do not stay are gone (DynamicViT, AS-ViT, Top-K; EViT without fusion)."""

from __future__ import annotations

from prunesearch.tokens.registry import Grouping, ReduceInput, reducer
from prunesearch.tokens.select import top_k


@reducer("drop", source="DynamicViT (NeurIPS 2021, arXiv 2106.02034)")
def drop(scene: ReduceInput) -> Grouping:
    """Remove the tokens that are not among the best."""
    assert scene.scores_Bn is not None
    kept_BK, _ = top_k(scene.scores_Bn, scene.kept)
    return Grouping(kept_BK)
