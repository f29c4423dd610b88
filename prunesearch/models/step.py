"""Carry out one step: score the tokens, group them, and apply the grouping to all that belongs to a token."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunesearch.config import Scalar
from prunesearch.schedule import Stage, Step, options_for
from prunesearch.tokens.inputs import Attended, Grouping, Pooled, ReduceInput, ScoreInput
from prunesearch.tokens.registry import REDUCERS, SCORERS, load_functions
from prunesearch.tokens.select import add_rows, gather, in_onnx_export, may_overwrite, placed, put
from prunesearch.tokens.verbs import RETURNS

load_functions()
_NO_CONTEXT = nullcontext()


class Evidence(NamedTuple):
    """What a stage decides by, gathered when its attention ran: scores, keys (mean over heads), both or none.

    takes_largest: when tokens join, their score is the largest of their scores instead of the sum.
    """

    scores_Bn: Tensor | None = None
    keys_BnD: Tensor | None = None
    takes_largest: bool = False


class Away(NamedTuple):
    """What brings back the tokens that left at one step, see `returned`.

    until: the block before which they are back. patches_BnC: the patch tokens that arrived at the step.
    kept_BK: the places of those that went on; None where tokens stay in their slots. The following is given there, and
    where others joined those that went on.
    index_Bn: for each of patches_BnC the place of the token that it is among those that went on, or that it joined.
    own_BnC: what it had of its own then; None when that is not given back. stays_Bn: 0 for the tokens that return by
    host_Bn and host_own_BnC (as index_Bn and own_BnC), or without those as they were; None when there are none. It
    carries gradients to the decision.
    size_Bn, present_Bn, place_Bn2, memory_Bn: as in `TokenState`, before the step.
    """

    until: int
    patches_BnC: Tensor
    kept_BK: Tensor | None = None
    index_Bn: Tensor | None = None
    own_BnC: Tensor | None = None
    stays_Bn: Tensor | None = None
    host_Bn: Tensor | None = None
    host_own_BnC: Tensor | None = None
    size_Bn: Tensor | None = None
    present_Bn: Tensor | None = None
    place_Bn2: Tensor | None = None
    memory_Bn: Tensor | None = None


class TokenState(NamedTuple):
    """What flows from block to block.

    size_Bn: how many original tokens each patch token stands for; None while nothing has merged.
    evidence: for the stages at the next block's `pre` that read attention, in their order.
    present_Bn: 1 for present patch tokens, 0 for empty slots; None when there are no empty slots.
    counts: patch tokens of each image after each masked step so far, (B,) each.
    bias_B11N: what the attention of the next blocks adds to its logits. Computed when a block first needs it; a step
    makes a new state without it.
    place_Bn2: row and column of each patch token in the image, fp32, for models whose attention reads them. A token
    that stands for several may lie between rows. None: every token is at its own place. found: what the blocks look up
    by it, computed when a block first needs it. away: the tokens that will come back, those that come first last.
    memory_Bn: running mean of the scores of each patch token, fp32; None while no block has added to it.
    """

    tokens_BNC: Tensor
    size_Bn: Tensor | None = None
    evidence: tuple[Evidence, ...] = ()
    present_Bn: Tensor | None = None
    counts: tuple[Tensor, ...] = ()
    bias_B11N: Tensor | None = None
    place_Bn2: Tensor | None = None
    found: Tensor | None = None
    away: tuple[Away, ...] = ()
    memory_Bn: Tensor | None = None


def with_tokens(state: TokenState, tokens_BNC: Tensor) -> TokenState:
    """The state with other tokens. `_replace` is more Python, and each block needs it twice."""
    return tuple.__new__(TokenState, (tokens_BNC, *state[1:]))


class Weights(NamedTuple):
    """The weight of each token by itself, and of each that stays with the weights of those that join it.

    own_Bn1: None when the sums have overwritten it.
    """

    own_Bn1: Tensor | None
    sum_BK1: Tensor


def gather_evidence(
    stage: Stage,
    patches_BnC: Tensor,
    attended: Attended | None,
    training: bool,
    present_Bn: Tensor | None = None,
    part: nn.Module | None = None,
    wanted: Literal["all", "scores", "keys"] = "all",
) -> Evidence:
    """Score the patch tokens for a stage, or take the keys by which it matches them.

    part: the learned module of the scorer, or None. wanted: a running mean of scores needs one of the two at a time.
    """
    keys_BnD = None
    if REDUCERS[stage.reduce].needs_keys and wanted != "scores":
        assert attended is not None and attended.keys_BnD is not None
        keys_BnD = attended.keys_BnD
    if stage.score == "none" or wanted == "keys":
        return Evidence(None, keys_BnD)
    entry = SCORERS[stage.score]
    options = options_for(entry, stage)
    with full_precision(patches_BnC):
        scene = ScoreInput(patches_BnC, attended, stage.block, training, present_Bn, part)
        scores_Bn = entry.function(scene, **options)
    return Evidence(scores_Bn, keys_BnD, takes_largest=options.get("merged") == "max")


def mean_keys(key_BHND: Tensor, prefix_tokens: int) -> Tensor:
    """What verbs match patch tokens by: their keys, mean over heads, in fp32, (B, n, D)."""
    return key_BHND.mean(dim=1, dtype=torch.float32)[:, prefix_tokens:]


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
    entry, options = step.verb, step.options
    patches_BnC = state.tokens_BNC[:, prefix_tokens:]
    size_Bn, place_Bn2, away, memory_Bn = state.size_Bn, state.place_Bn2, state.away, state.memory_Bn
    with full_precision(patches_BnC):
        scene = ReduceInput(patches_BnC, own.scores_Bn, own.keys_BnD, size_Bn, step.kept, part, prefix_tokens)
        grouping = entry.function(scene, **options)
        if isinstance(grouping, Pooled):
            parts: tuple[Tensor, ...] = (grouping.patches_BKC.to(patches_BnC.dtype),)
            size_Bn = None if size_Bn is None else equal_sizes(size_Bn, step.kept)
            place_Bn2 = None if place_Bn2 is None else centre(place_Bn2, step.kept)
            memory_Bn = None
        else:
            parts, weights = _regrouped(patches_BnC, grouping)
            if size_Bn is not None or entry.merges:
                size_Bn = _sizes(size_Bn, grouping, weights)
            if place_Bn2 is not None:
                place_Bn2 = _moved(place_Bn2, grouping, takes_mean(options))
            if memory_Bn is not None and grouping.host_BG is not None and step.until is not None:
                memory_Bn = memory_Bn.gather(1, grouping.kept_BK)  # guests come back with their own
            elif memory_Bn is not None:
                memory_Bn = add_up(memory_Bn, grouping)
            later = tuple(_follow(evidence, grouping) for evidence in later)
    tokens_BNC = torch.cat([state.tokens_BNC[:, :prefix_tokens], *parts], dim=1)
    if step.until is not None:
        assert isinstance(grouping, Grouping), "resolve refuses it"
        left = _away(step.until, state, prefix_tokens, grouping, tokens_BNC[:, prefix_tokens:], adds_own(options))
        away = (*away, left)
    return TokenState(tokens_BNC, size_Bn, place_Bn2=place_Bn2, away=away, memory_Bn=memory_Bn), later


def _away(until: int, state: TokenState, prefix_tokens: int, grouping: Grouping, after_BKC: Tensor, adds: bool) -> Away:
    """What brings the tokens back that a step takes away. after_BKC: the patch tokens after it."""
    patches_BnC = state.tokens_BNC[:, prefix_tokens:]
    kept_BK, guests_BG, host_BG = grouping.kept_BK, grouping.guests_BG, grouping.host_BG
    before = Away(
        until,
        patches_BnC,
        kept_BK,
        size_Bn=state.size_Bn,
        place_Bn2=state.place_Bn2,
        memory_Bn=state.memory_Bn,
    )
    if guests_BG is None:
        return before
    kept, tokens = kept_BK.shape[1], patches_BnC.shape[1]
    places_BK = torch.arange(kept, device=kept_BK.device).expand_as(kept_BK)
    stays_Bn = None
    if host_BG is None:  # they form the token after those that stay
        host_BG = torch.full_like(guests_BG, kept)
    elif grouping.ordered_BnC is None:
        # a guest that is its own host has left without joining one
        stays_Bn = 1 - placed((host_BG == guests_BG).to(patches_BnC.dtype), guests_BG, tokens)
        host_BG = placed(places_BK, kept_BK, tokens).gather(1, host_BG)
    index_Bn = placed(torch.cat([places_BK, host_BG], dim=1), torch.cat([kept_BK, guests_BG], dim=1), tokens)
    own_BnC = patches_BnC - gather(after_BKC, index_Bn) if adds else None
    return before._replace(index_Bn=index_Bn, own_BnC=own_BnC, stays_Bn=stays_Bn)


def returned(state: TokenState, prefix_tokens: int) -> TokenState:
    """The state with the tokens back that left last. Each is in its place, with the size it had.

    A token that left returns as it was. One that joined another returns as that one is now, plus what it had of its own
    when it joined, where the verb says so; likewise the one that it joined, which was changed by it.
    """
    away = state.away[-1]
    patches_BnC, now_BKC = away.patches_BnC, state.tokens_BNC[:, prefix_tokens:]
    if away.index_Bn is None:
        assert away.kept_BK is not None
        back_BnC = put(patches_BnC, away.kept_BK, now_BKC)
    else:
        back_BnC = _from(now_BKC, away.index_Bn, away.own_BnC)
        if away.stays_Bn is not None:
            other_BnC = patches_BnC if away.host_Bn is None else _from(now_BKC, away.host_Bn, away.host_own_BnC)
            back_BnC = _chosen(away.stays_Bn, back_BnC, other_BnC)
    return TokenState(
        torch.cat([state.tokens_BNC[:, :prefix_tokens], back_BnC], dim=1),
        away.size_Bn,
        present_Bn=away.present_Bn,
        counts=state.counts,
        place_Bn2=away.place_Bn2,
        away=state.away[:-1],
        memory_Bn=_memory_back(away, state.memory_Bn),
    )


def _memory_back(away: Away, now_BK: Tensor | None) -> Tensor | None:
    """The running mean of scores with all tokens back. What was away has the one with which it left.

    None when it left without one: the mean begins anew.
    """
    before_Bn = away.memory_Bn
    if now_BK is None or before_Bn is None:
        return None
    if away.kept_BK is not None:
        return put(before_Bn[..., None], away.kept_BK, now_BK[:, : away.kept_BK.shape[1], None])[..., 0]
    assert away.index_Bn is not None and away.stays_Bn is not None
    return torch.where(away.stays_Bn > 0, now_BK.gather(1, away.index_Bn), before_Bn)


def _from(now_BKC: Tensor, index_Bn: Tensor | None, own_BnC: Tensor | None) -> Tensor:
    assert index_Bn is not None
    back_BnC = gather(now_BKC, index_Bn)
    return back_BnC if own_BnC is None else back_BnC + own_BnC


def _chosen(stays_Bn: Tensor, yes_BnC: Tensor, no_BnC: Tensor) -> Tensor:
    """The one where stays_Bn is 1, the other where it is 0, with gradients to stays_Bn."""
    chosen_BnC = torch.where(stays_Bn[..., None] > 0, yes_BnC, no_BnC)
    if not stays_Bn.requires_grad:
        return chosen_BnC
    change_Bn = stays_Bn - stays_Bn.detach()
    return chosen_BnC + (change_Bn[..., None] * (yes_BnC - no_BnC).detach().float()).to(chosen_BnC.dtype)


def adds_own(options: Mapping[str, Scalar]) -> bool:
    """Whether a token that joined another returns with what it had of its own."""
    return options.get(RETURNS) == "residual"


def takes_mean(options: Mapping[str, Scalar]) -> bool:
    """Whether a verb with these options puts a token that stands for several at the mean of their places."""
    return options.get("position") == "mean"


def regroup(values_BnC: Tensor, grouping: Grouping) -> Tensor:
    """Apply a grouping to the features of tokens. Keeps the dtype."""
    if grouping.ordered_BnC is not None:
        grouping = grouping._replace(ordered_BnC=_ordered(values_BnC, grouping))
    parts, _ = _regrouped(values_BnC, grouping)
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _regrouped(values_BnC: Tensor, grouping: Grouping) -> tuple[tuple[Tensor, ...], Weights | None]:
    """The features of the new tokens, in parts to be joined: those that stay, and the one that the others form.

    Also their weights, when others join those that stay.
    """
    channels, kept = values_BnC.shape[-1], grouping.kept_BK.shape[1]
    if grouping.guests_BG is None:
        return (gather(values_BnC, grouping.kept_BK),), None
    weight_BG, ordered_BnC = grouping.guest_weight_BG, grouping.ordered_BnC
    if grouping.host_BG is None:
        ordered_BnC = _ordered(values_BnC, grouping) if ordered_BnC is None else ordered_BnC
        kept_BKC, guests_BGC = ordered_BnC[:, :kept], ordered_BnC[:, kept:].float()
        if weight_BG is None:
            extra_B1C = guests_BGC.sum(dim=1, keepdim=True)
        else:
            extra_B1C = torch.bmm(weight_BG[:, None], guests_BGC)
        return (kept_BKC, extra_B1C.to(values_BnC.dtype)), None
    # one more channel with the weights, so that they add up with the features
    # at batch 1 on a CPU each new copy of all tokens costs as much as the arithmetic
    overwrites = may_overwrite()
    own_BnD = _weighted((values_BnC if ordered_BnC is None else ordered_BnC).float(), grouping, overwrites)
    guests_BGD = _guests(own_BnD, grouping)
    guests_BGD = guests_BGD if weight_BG is None else guests_BGD * weight_BG[..., None]
    is_lost = overwrites and ordered_BnC is None  # else the guests may be a view of it
    sum_BKD = _joined(own_BnD, grouping, guests_BGD, 1 / grouping.own_weight, is_lost)
    sum_BKC, weight_BK1 = sum_BKD[..., :channels], sum_BKD[..., channels:]
    mean_BKC = sum_BKC.div_(weight_BK1) if overwrites else sum_BKC / weight_BK1
    return (mean_BKC.to(values_BnC.dtype),), Weights(None if is_lost else own_BnD[..., channels:], weight_BK1)


def _weighted(values_BnC: Tensor, grouping: Grouping, overwrites: bool) -> Tensor:
    """The values times their weights, and the weights as the last channel, in new memory."""
    if grouping.weight_Bn is None:
        return torch.constant_pad_nd(values_BnC, (0, 1), 1.0)  # F.pad without its Python
    weight_Bn1 = grouping.weight_Bn[..., None]
    if overwrites:
        own_BnD = torch.cat([values_BnC, weight_Bn1], dim=-1)
        own_BnD[..., :-1].mul_(weight_Bn1)
        return own_BnD
    return torch.cat([values_BnC * weight_Bn1, weight_Bn1], dim=-1)


def _ordered(values_BnC: Tensor, grouping: Grouping) -> Tensor:
    """The values of the kept tokens and then of the guests."""
    assert grouping.guests_BG is not None
    return gather(values_BnC, torch.cat([grouping.kept_BK, grouping.guests_BG], dim=1))


def _in_order(values_BnD: Tensor, grouping: Grouping) -> Tensor:
    """The values of all tokens in the order that host_BG counts."""
    return values_BnD if grouping.ordered_BnC is None else _ordered(values_BnD, grouping)


def _guests(own_BnD: Tensor, grouping: Grouping) -> Tensor:
    """The values of the guests, (B, G, D), from those of all tokens in the order that host_BG counts."""
    assert grouping.guests_BG is not None
    if grouping.ordered_BnC is None:
        return gather(own_BnD, grouping.guests_BG)
    return own_BnD[:, grouping.kept_BK.shape[1] :]


def _joined(
    own_BnD: Tensor, grouping: Grouping, guests_BGD: Tensor, scale: float = 1.0, overwrites: bool = False
) -> Tensor:
    """The value of each kept token plus `scale` times those of its guests, (B, K, D).

    own_BnD: of all tokens in the order that host_BG counts. overwrites: it is not needed any more.
    """
    return _kept(_plus_guests(own_BnD, grouping.host_BG, guests_BGD, scale, overwrites), grouping)


def _kept(values_BnD: Tensor, grouping: Grouping) -> Tensor:
    """The values of the kept tokens, from those of all tokens in the order that host_BG counts.

    In image order guests join before the kept tokens are gathered, because that needs no search for the hosts among the
    kept tokens.
    """
    if grouping.ordered_BnC is None:
        return gather(values_BnD, grouping.kept_BK)
    return values_BnD[:, : grouping.kept_BK.shape[1]]


def _plus_guests(
    own_BnD: Tensor, host_BG: Tensor | None, guests_BGD: Tensor, scale: float, overwrites: bool = False
) -> Tensor:
    """The value of each token plus `scale` times those of its guests.

    An ONNX graph has a product with a one-hot matrix here, because not all runtimes can scatter with a reduction.
    """
    assert host_BG is not None
    if not in_onnx_export():
        return add_rows(own_BnD, host_BG, guests_BGD, scale, overwrites)
    joins_BnG = _joins(host_BG, own_BnD.shape[1])
    return own_BnD + (joins_BnG.to(guests_BGD.dtype) * scale) @ guests_BGD


def _largest_of_guests(own_BnD: Tensor, host_BG: Tensor | None, guests_BGD: Tensor) -> Tensor:
    """The largest of the value of each token and those of its guests."""
    assert host_BG is not None
    if not in_onnx_export():
        return own_BnD.scatter_reduce(1, host_BG[..., None].expand_as(guests_BGD), guests_BGD, "amax")
    joins_BnG = _joins(host_BG, own_BnD.shape[1])
    own_or_guest_BnGD = torch.where(joins_BnG[..., None], guests_BGD[:, None], own_BnD[:, :, None])
    return torch.maximum(own_BnD, own_or_guest_BnGD.amax(dim=2))


def _joins(host_BG: Tensor, tokens: int) -> Tensor:
    """Whether each guest joins each of the tokens, (B, n, G)."""
    return host_BG[:, None] == torch.arange(tokens, device=host_BG.device)[:, None]


def _sizes(size_Bn: Tensor | None, grouping: Grouping, weights: Weights | None) -> Tensor:
    """The sizes of the new tokens. size_Bn: of the old ones; None when all are 1."""
    share_BG = grouping.size_share_BG
    if weights is not None and grouping.weight_Bn is size_Bn and share_BG is grouping.guest_weight_BG:
        return weights.sum_BK1[..., 0]  # the weights are the sizes
    if size_Bn is not None:
        return add_up(size_Bn, grouping)
    assert weights is not None and grouping.host_BG is not None
    share_BG = torch.ones_like(grouping.host_BG, dtype=torch.float32) if share_BG is None else share_BG
    ones_Bn1 = weights.own_Bn1  # without sizes and weights each token weighs 1
    if ones_Bn1 is None or grouping.weight_Bn is not None:
        tokens = grouping.kept_BK.shape[1] + grouping.host_BG.shape[1]
        ones_Bn1 = weights.sum_BK1.new_ones(len(grouping.kept_BK), tokens, 1)
    return _joined(ones_Bn1, grouping, share_BG[..., None])[..., 0]


def add_up(amount_Bn: Tensor, grouping: Grouping) -> Tensor:
    """Apply a grouping to amounts, which add up where tokens join (sizes; attention received)."""
    if grouping.guests_BG is None:
        return amount_Bn.gather(1, grouping.kept_BK)
    own_Bn1 = _in_order(amount_Bn[..., None], grouping)
    guests_BG1 = _guests(own_Bn1, grouping)
    if grouping.size_share_BG is not None:
        guests_BG1 = guests_BG1 * grouping.size_share_BG[..., None]
    if grouping.host_BG is None:
        return torch.cat([amount_Bn.gather(1, grouping.kept_BK), guests_BG1.sum(dim=1)], dim=1)
    return _joined(own_Bn1, grouping, guests_BG1)[..., 0]


def largest_part(amount_Bn: Tensor, grouping: Grouping) -> Tensor:
    """Apply a grouping to non-negative amounts; where tokens join, the largest of them stays."""
    if grouping.guests_BG is None:
        return amount_Bn.gather(1, grouping.kept_BK)
    own_Bn1 = _in_order(amount_Bn[..., None], grouping)
    guests_BG1 = _guests(own_Bn1, grouping)
    if grouping.host_BG is None:
        return torch.cat([amount_Bn.gather(1, grouping.kept_BK), guests_BG1.amax(dim=1)], dim=1)
    return _kept(_largest_of_guests(own_Bn1, grouping.host_BG, guests_BG1), grouping)[..., 0]


def _moved(place_Bn2: Tensor, grouping: Grouping, mean: bool) -> Tensor:
    """Apply a grouping to places. mean: where tokens join, their mean, weighted as their features; else the host's.

    The token that the others form lies at their mean.
    """
    if grouping.guests_BG is None or (grouping.host_BG is not None and not mean):
        return gather(place_Bn2, grouping.kept_BK)
    if grouping.host_BG is not None:
        return regroup(place_Bn2, grouping)
    guests_BG2, weight_BG = gather(place_Bn2, grouping.guests_BG), grouping.guest_weight_BG
    weight_BG = torch.ones_like(guests_BG2[..., 0]) if weight_BG is None else weight_BG
    return torch.cat([gather(place_Bn2, grouping.kept_BK), weighted_mean(guests_BG2, weight_BG)], dim=1)


def weighted_mean(place_Bn2: Tensor, weight_Bn: Tensor) -> Tensor:
    """The mean of places, (B, 1, 2). The corner of the image where all weights are 0."""
    total_B1 = weight_Bn.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return ((weight_Bn / total_B1)[..., None] * place_Bn2).sum(dim=1, keepdim=True)


def centre(place_Bn2: Tensor, count: int, present_Bn: Tensor | None = None) -> Tensor:
    """Places for `count` tokens that replace all others: the mean of their places, the same for each."""
    present_Bn = torch.ones_like(place_Bn2[..., 0]) if present_Bn is None else present_Bn
    return weighted_mean(place_Bn2, present_Bn).expand(-1, count, -1)


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast: ranks, cosines and shares need fp32 (in fp16, scores that are close tie)."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NO_CONTEXT


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
