"""The table of reduce verbs: the facts of each, and where its functions are. Imports nothing heavy.

`registry.Reducer` explains the fields. To add a verb, write its file in this folder and an entry here. `summary` is the
first line of the function's docstring.
"""

from __future__ import annotations

from collections.abc import Mapping

from prunesearch.config import Scalar
from prunesearch.registry import Named
from prunesearch.shape import ModelShape
from prunesearch.tokens.registry import REDUCERS, Reducer

PARITIES = ("patches", "all")
"""Values of the option parity: the tokens among which places are counted. Every second token looks for a partner."""
POSITIONS = ("host", "mean")
"""Values of the option position: where a token that stands for several is, for attention that reads positions."""

RETURNS = "returns"
"""Name of the option that says what a token is that comes back, in stages with `until`."""
RETURN_FORMS = ("residual", "copy")
"""Its values: the token that it joined, with or without what it had of its own when it left."""


def _no_effect(shape: ModelShape) -> tuple[str, ...]:
    """parity has no effect after an odd number of prefix tokens: patches 1, 3, 5, ... look for a partner either way.
    position has none where attention reads no positions."""
    parity = ("parity",) if shape.prefix_tokens % 2 else ()
    return (*parity, *_position_no_effect(shape))


def _position_no_effect(shape: ModelShape) -> tuple[str, ...]:
    return () if shape.has_positions else ("position",)


def _held(options: Mapping[str, Scalar]) -> tuple[str, Mapping[str, Scalar]]:
    """Evo-ViT: the others leave until the next stage. With a representative token, which takes part in their place,
    they come back with what the blocks added to it."""
    return ("fuse", {"normalised": True}) if options["representative"] else ("drop", {})


def _half(present: int) -> int:
    return (present + 1) // 2


def _similarity_macs(shape: ModelShape, before: int, kept: int) -> int:
    return kept * (before - kept) * shape.dim


def _matching_macs(shape: ModelShape, before: int, kept: int) -> int:
    return (before // 2) * ((before + 1) // 2) * (shape.attention_dim // shape.heads)


def _weighted_sum_macs(shape: ModelShape, before: int, kept: int) -> int:
    return (before - kept) * shape.dim


def _queries_macs(shape: ModelShape, before: int, kept: int) -> int:
    return 2 * kept * before * shape.dim


for _entry in (
    Reducer(
        "squeeze",
        Named("prunesearch.tokens.squeeze:squeeze"),
        summary="Mix each of the others into its most similar kept token, by exp(cosine / temperature) against "
        "e for the host.",
        source="TPS (CVPR 2023, arXiv 2304.10716), eq. 3-5",
        masked=Named("prunesearch.tokens.squeeze:masked"),
        takes_threshold=True,
        macs=_similarity_macs,
        options={"temperature": 1.0, "position": "host", RETURNS: "residual"},
        choices={"position": POSITIONS, RETURNS: RETURN_FORMS},
        no_effect=_position_no_effect,
        bounds={"temperature": (0.02, 100.0)},  # below, exp(1 / temperature) comes near the largest fp32
    ),
    Reducer(
        "absorb",
        Named("prunesearch.tokens.absorb:absorb"),
        summary="Average each of the others into its most similar kept token (plain mean), whose size grows by "
        "cosine x size.",
        source="DiffRate (ICCV 2023, arXiv 2305.17997), merging; from its released code",
        masked=Named("prunesearch.tokens.absorb:masked"),
        takes_threshold=True,
        merges=True,
        macs=_similarity_macs,
        options={"proportional_attention": True, "position": "host", RETURNS: "residual"},
        choices={"position": POSITIONS, RETURNS: RETURN_FORMS},
        no_effect=_position_no_effect,
    ),
    Reducer(
        "drop",
        Named("prunesearch.tokens.drop:drop"),
        summary="Remove the tokens that are not among the best.",
        source="DynamicViT (NeurIPS 2021, arXiv 2106.02034)",
        masked=Named("prunesearch.tokens.drop:masked"),
        takes_threshold=True,
    ),
    Reducer(
        "merge",
        Named("prunesearch.tokens.merge:merge"),
        summary="Match every second token to its most similar neighbour set and average the closest pairs, "
        "weighted by size.",
        source="ToMe (ICLR 2023, arXiv 2210.09461)",
        masked=Named("prunesearch.tokens.merge:masked"),
        takes_threshold=True,
        ranks=False,
        needs_keys=True,
        merges=True,
        fewest_kept=_half,
        macs=_matching_macs,
        options={"proportional_attention": True, "parity": "patches", "position": "host", RETURNS: "residual"},
        choices={"parity": PARITIES, "position": POSITIONS, RETURNS: RETURN_FORMS},
        no_effect=_no_effect,
    ),
    Reducer(
        "drop_or_merge",
        Named("prunesearch.tokens.drop_or_merge:drop_or_merge"),
        summary="Merge as `merge` does where the scores are alike (their variance is below `variance`), else "
        "drop the lowest.",
        source="PPT (arXiv 2310.01812)",
        needs_keys=True,
        merges=True,
        fewest_kept=_half,
        macs=_matching_macs,
        options={
            "variance": 7e-5,
            "proportional_attention": True,
            "parity": "patches",
            "position": "host",
            RETURNS: "residual",
        },
        choices={"parity": PARITIES, "position": POSITIONS, RETURNS: RETURN_FORMS},
        bounds={"variance": (0.0, 1.0)},
        no_effect=_no_effect,
    ),
    Reducer(
        "fuse",
        Named("prunesearch.tokens.fuse:fuse"),
        summary="Sum the others, each times its score, into one token appended at the end.",
        source="EViT (ICLR 2022, arXiv 2202.07800), eq. 4",
        masked=Named("prunesearch.tokens.fuse:masked"),
        takes_threshold=True,
        extra_tokens=1,
        macs=_weighted_sum_macs,
        options={"normalised": False, RETURNS: "residual"},
        choices={RETURNS: RETURN_FORMS},
    ),
    Reducer(
        "hold",
        Named("prunesearch.tokens.hold:hold"),
        summary="The others wait until the next stage: outside the blocks (ViT), or by a linear path (Swin, ConvNeXt).",
        source="Evo-ViT (AAAI 2022, arXiv 2108.01390); dynamic spatial sparsification (T-PAMI, arXiv 2207.01580)",
        masked=Named("prunesearch.tokens.hold:masked"),
        part=Named("prunesearch.tokens.hold:part"),
        holds=True,
        on_tokens=_held,
        options={"representative": False},
        no_effect=lambda shape: ("representative",) if shape.holds else (),
    ),
    Reducer(
        "pool",
        Named("prunesearch.tokens.pool:pool"),
        summary="Replace all patch tokens by as many as asked for, each a learned query's mixture of the "
        "normalised tokens.",
        source="PatchMerger (arXiv 2202.12015)",
        masked=Named("prunesearch.tokens.pool:masked"),
        part=Named("prunesearch.tokens.pool:part"),
        ranks=False,
        pools=True,
        macs=_queries_macs,
        options={"scaled": True},
    ),
):
    REDUCERS.add(_entry.name, _entry)
