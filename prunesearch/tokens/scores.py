"""The table of scores: the facts of each, and where its function is. Imports nothing heavy.

`registry.Scorer` explains the fields. To add a score, write its file in this folder and an entry here. `summary` is the
first line of the function's docstring.
"""

from __future__ import annotations

from prunesearch.registry import Named
from prunesearch.shape import ModelShape
from prunesearch.tokens.registry import SCORERS, Scorer

MOMENTUM = "momentum"
"""Name of the option of a score that is a running mean over blocks: the share of what it was before each block."""


def _matrix_macs(shape: ModelShape, tokens: int) -> int:
    return tokens * tokens * shape.attention_dim


def _row_macs(shape: ModelShape, tokens: int) -> int:
    return shape.class_tokens * tokens * shape.attention_dim


def _predictor_macs(shape: ModelShape, tokens: int) -> int:
    c = shape.dim
    return tokens * (c * c + c * (c // 2) + (c // 2) * (c // 4) + (c // 4) * 2)


for _entry in (
    Scorer(
        "attention_received",
        Named("prunesearch.tokens.attention_received:attention_received"),
        summary="Attention each patch token receives, averaged over heads and over all queries (prefix tokens "
        "included).",
        source="LTMP (TMLR 2023, arXiv 2307.10780)",
        macs=_matrix_macs,
        options={"merged": "sum"},
        choices={"merged": ("sum", "max")},
    ),
    Scorer(
        "class_attention",
        Named("prunesearch.tokens.class_attention:class_attention"),
        summary="Attention the class token pays to each patch token, averaged over heads.",
        source="EViT (ICLR 2022, arXiv 2202.07800), eq. 3; with momentum Evo-ViT (AAAI 2022, arXiv 2108.01390)",
        needs_class_token=True,
        macs=_row_macs,
        options={MOMENTUM: 0.0},
        bounds={MOMENTUM: (0.0, 0.99)},
    ),
    Scorer(
        "head_weighted_class_attention",
        Named("prunesearch.tokens.class_attention:head_weighted_class_attention"),
        summary="Class attention with each head weighted, per token, by the norm of the token's output in that head.",
        source="AS-ViT (IJCAI 2023, arXiv 2209.13802)",
        needs_class_token=True,
        macs=_row_macs,
    ),
    Scorer(
        "value_weighted",
        Named("prunesearch.tokens.class_attention:value_weighted"),
        summary="Class attention summed over heads, times the norm of the token's value vector; sums to 1 over "
        "patch tokens.",
        source="PPT (arXiv 2310.01812), ATS (ECCV 2022, arXiv 2111.15667) eq. 4",
        needs_class_token=True,
        macs=_row_macs,
    ),
    Scorer(
        "key_norm",
        Named("prunesearch.tokens.key_norm:key_norm"),
        summary="Norm of the token's key over all heads, as a share of the sum over patch tokens.",
        source="a free baseline of our own; no paper proposes it for ViTs",
    ),
    Scorer(
        "predictor",
        Named("prunesearch.tokens.predictor:predictor"),
        summary="Probability that a token stays, from a learned two-way classifier (local and global features).",
        source="DynamicViT (NeurIPS 2021, arXiv 2106.02034), eq. 1-6",
        needs_attention=False,
        macs=_predictor_macs,
        part=Named("prunesearch.tokens.predictor:part"),
    ),
    Scorer(
        "random",
        Named("prunesearch.tokens.random_score:random_score"),
        summary="Random: anew for every image while training; in eval mode one fixed order of slots per block "
        "and seed.",
        source="baseline",
        needs_attention=False,
        options={"seed": 0},
        bounds={"seed": (0, 2**31 - 1)},
    ),
):
    SCORERS.add(_entry.name, _entry)
