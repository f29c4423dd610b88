"""Carry out one step: score the tokens, group them, and apply the grouping to all that belongs to a token."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunesearch.schedule import Stage, Step, options_of
from prunesearch.tokens.inputs import Attended, Grouping, Pooled, ReduceInput, ScoreInput
from prunesearch.tokens.registry import REDUCERS, SCORERS, load_functions
from prunesearch.tokens.select import gather

load_functions()


class Evidence(NamedTuple):
    """What a stage decides by, gathered when its attention ran: scores, keys (mean over heads), both or none.

    takes_largest: when tokens join, their score is the largest of their scores instead of the sum.
    """

    scores_Bn: Tensor | None = None
    keys_BnD: Tensor | None = None
    takes_largest: bool = False


class TokenState(NamedTuple):
    """What flows from block to block.

    size_Bn: how many original tokens each patch token stands for; None while nothing has merged.
    evidence: for the stages at the next block's `pre` that read attention, in their order.
    present_Bn: 1 for present patch tokens, 0 for empty slots; None when there are no empty slots.
    counts: patch tokens of each image after each masked step so far, (B,) each.
    bias_B11N: what the attention of the next blocks adds to its logits. Computed when a block first needs it; a step
    makes a new state without it.
    """

    tokens_BNC: Tensor
    size_Bn: Tensor | None = None
    evidence: tuple[Evidence, ...] = ()
    present_Bn: Tensor | None = None
    counts: tuple[Tensor, ...] = ()
    bias_B11N: Tensor | None = None


class Weights(NamedTuple):
    """The weight of each token that stays, 1, and its sum with the weights of those that join it."""

    own_BK1: Tensor
    sum_BK1: Tensor


def gather_evidence(
    stage: Stage,
    patches_BnC: Tensor,
    attended: Attended | None,
    training: bool,
    present_Bn: Tensor | None = None,
    part: nn.Module | None = None,
) -> Evidence:
    """Score the patch tokens for a stage, or take the keys by which it matches them.

    part: the learned module of the scorer, or None.
    """
    scores_Bn = keys_BnD = None
    options = options_of(stage)
    with full_precision(patches_BnC):
        if REDUCERS[stage.reduce].needs_keys:
            assert attended is not None
            keys_BnD = attended.key_BHND[:, :, attended.prefix_tokens :].float().mean(dim=1)
        if stage.score != "none":
            entry = SCORERS[stage.score]
            scene = ScoreInput(patches_BnC, attended, stage.block, training, present_Bn, part)
            scores_Bn = entry.function(scene, **{name: options[name] for name in entry.options})
    return Evidence(scores_Bn, keys_BnD, takes_largest=options.get("merged") == "max")


def take_step(
    step: Step,
    state: TokenState,
    prefix_tokens: int,
    own: Evidence,
    later: tuple[Evidence, ...],
    part: nn.Module | None = None,
) -> tuple[TokenState, tuple[Evidence, ...]]:
    """Reduce the patch tokens of `state` from step.before to step.after.

    own: the evidence of this step. later: the evidence of later stages. part: the learned module of the reducer.
    Returns the new state (without evidence), and `later` for the new tokens.
    """
    entry = REDUCERS[step.stage.reduce]
    options = options_of(step.stage)
    patches_BnC = state.tokens_BNC[:, prefix_tokens:]
    size_Bn = state.size_Bn
    with full_precision(patches_BnC):
        scene = ReduceInput(patches_BnC, own.scores_Bn, own.keys_BnD, size_Bn, step.kept, part, prefix_tokens)
        grouping = entry.function(scene, **{name: options[name] for name in entry.options})
        if isinstance(grouping, Pooled):
            parts: tuple[Tensor, ...] = (grouping.patches_BKC.to(patches_BnC.dtype),)
            size_Bn = None if size_Bn is None else equal_sizes(size_Bn, step.kept)
        else:
            parts, weights = _regrouped(patches_BnC, grouping)
            if size_Bn is not None:
                size_Bn = add_up(size_Bn, grouping)
            elif entry.merges:
                assert weights is not None
                size_Bn = _first_sizes(grouping, weights)
            later = tuple(_follow(evidence, grouping) for evidence in later)
    tokens_BNC = torch.cat([state.tokens_BNC[:, :prefix_tokens], *parts], dim=1)
    return TokenState(tokens_BNC, size_Bn), later


def regroup(values_BnC: Tensor, grouping: Grouping) -> Tensor:
    """Apply a grouping to the features of tokens. Keeps the dtype."""
    parts, _ = _regrouped(values_BnC, grouping._replace(ordered_BnC=None))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _regrouped(values_BnC: Tensor, grouping: Grouping) -> tuple[tuple[Tensor, ...], Weights | None]:
    """The features of the new tokens, in parts to be joined: those that stay, and the one that the others form.

    Also their weights, when others join those that stay.
    """
    channels, kept = values_BnC.shape[-1], grouping.kept_BK.shape[1]
    if grouping.guests_BG is None:
        return (gather(values_BnC, grouping.kept_BK),), None
    weight_BG = grouping.guest_weight_BG
    ordered_BnC = grouping.ordered_BnC
    if ordered_BnC is None:
        ordered_BnC = gather(values_BnC, torch.cat([grouping.kept_BK, grouping.guests_BG], dim=1))
    kept_BKC, guests_BGC = ordered_BnC[:, :kept], ordered_BnC[:, kept:].float()
    if grouping.host_BG is None:
        extra_B1C = guests_BGC.sum(dim=1, keepdim=True) if weight_BG is None else weight_BG[:, None] @ guests_BGC
        return (kept_BKC, extra_B1C.to(values_BnC.dtype)), None
    # one more channel of ones, so that weights add up with the features
    sum_BnD = F.pad(ordered_BnC.float(), (0, 1), value=1.0)
    guests_BGD = sum_BnD[:, kept:] if weight_BG is None else sum_BnD[:, kept:] * weight_BG[..., None]
    sum_BKD = _joined(sum_BnD[:, :kept], grouping.host_BG, guests_BGD)
    mean_BKC = sum_BKD[..., :channels] / sum_BKD[..., channels:]
    return (mean_BKC.to(values_BnC.dtype),), Weights(sum_BnD[:, :kept, channels:], sum_BKD[..., channels:])


def _joined(hosts_BKD: Tensor, host_BG: Tensor, guests_BGD: Tensor, largest: bool = False) -> Tensor:
    """Each host plus the sum of its guests, (B, K, D); or the largest of them.

    An ONNX graph has a product with a one-hot matrix here, because not all runtimes can scatter with a reduction.
    """
    if not torch.onnx.is_in_onnx_export():
        host_BGD = host_BG[..., None].expand_as(guests_BGD)
        if largest:
            return hosts_BKD.scatter_reduce(1, host_BGD, guests_BGD, "amax")
        return hosts_BKD.scatter_add(1, host_BGD, guests_BGD)
    joins_BKG = host_BG[:, None] == torch.arange(hosts_BKD.shape[1], device=host_BG.device)[:, None]
    if largest:
        own_or_guest_BKGD = torch.where(joins_BKG[..., None], guests_BGD[:, None], hosts_BKD[:, :, None])
        return torch.maximum(hosts_BKD, own_or_guest_BKGD.amax(dim=2))
    return hosts_BKD + joins_BKG.to(guests_BGD.dtype) @ guests_BGD


def _first_sizes(grouping: Grouping, weights: Weights) -> Tensor:
    """Sizes after the first step that joins tokens; all had size 1 before."""
    assert grouping.host_BG is not None
    if grouping.size_share_BG is grouping.guest_weight_BG:
        return weights.sum_BK1[..., 0]
    share_BG = grouping.size_share_BG
    share_BG = torch.ones_like(grouping.host_BG, dtype=torch.float32) if share_BG is None else share_BG
    return _joined(weights.own_BK1, grouping.host_BG, share_BG[..., None])[..., 0]


def add_up(amount_Bn: Tensor, grouping: Grouping) -> Tensor:
    """Apply a grouping to amounts, which add up where tokens join (sizes; attention received)."""
    kept_BK = amount_Bn.gather(1, grouping.kept_BK)
    if grouping.guests_BG is None:
        return kept_BK
    guests_BG = amount_Bn.gather(1, grouping.guests_BG)
    if grouping.size_share_BG is not None:
        guests_BG = guests_BG * grouping.size_share_BG
    if grouping.host_BG is None:
        return torch.cat([kept_BK, guests_BG.sum(dim=1, keepdim=True)], dim=1)
    return _joined(kept_BK[..., None], grouping.host_BG, guests_BG[..., None])[..., 0]


def largest_part(amount_Bn: Tensor, grouping: Grouping) -> Tensor:
    """Apply a grouping to non-negative amounts; where tokens join, the largest of them stays."""
    kept_BK = amount_Bn.gather(1, grouping.kept_BK)
    if grouping.guests_BG is None:
        return kept_BK
    guests_BG = amount_Bn.gather(1, grouping.guests_BG)
    if grouping.guest_weight_BG is not None:
        guests_BG = guests_BG * (grouping.guest_weight_BG > 0)  # weight 0: dropped
    if grouping.host_BG is None:
        return torch.cat([kept_BK, guests_BG.amax(dim=1, keepdim=True)], dim=1)
    return _joined(kept_BK[..., None], grouping.host_BG, guests_BG[..., None], largest=True)[..., 0]


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast: ranks, cosines and shares need fp32 (in fp16, scores that are close tie)."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def equal_sizes(size_Bn: Tensor, count: int) -> Tensor:
    """Equal sizes for `count` tokens that replace all others, with the same sum: (B, n) to (B, count)."""
    return (size_Bn.sum(dim=1, keepdim=True) / count).expand(-1, count)


def _follow(evidence: Evidence, grouping: Grouping) -> Evidence:
    """Evidence for the new tokens. Where tokens joined, scores add up or the largest stays; keys mix as the tokens."""
    combine = largest_part if evidence.takes_largest else add_up
    return evidence._replace(
        scores_Bn=None if evidence.scores_Bn is None else combine(evidence.scores_Bn, grouping),
        keys_BnD=None if evidence.keys_BnD is None else regroup(evidence.keys_BnD, grouping),
    )
