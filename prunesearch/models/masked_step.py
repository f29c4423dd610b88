"""Carry out one step on tokens that stay in their slots: for learned decisions, and where images keep different counts.

After a token is removed, the content of its slot does not matter: nothing attends to it, scores it or counts it. Counts
come from the same function as in `resolve` (`count_of`). So with the same decisions, the masked pass and the gathered
one give the same tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.models.step import (
    Away,
    Evidence,
    TokenState,
    adds_own,
    centre,
    equal_sizes,
    full_precision,
    takes_mean,
    weighted_mean,
)
from prunesearch.schedule import Stage, Step, count_of
from prunesearch.tokens.inputs import Joining, MaskedInput, Pooled
from prunesearch.tokens.registry import REDUCERS
from prunesearch.tokens.select import above, best, draw, gather, placed

LEAST_SAVED = 0.05
"""A further group must save at least this share of the batch's slots."""


def take_masked_step(
    step: Step,
    state: TokenState,
    prefix_tokens: int,
    own: Evidence,
    later: tuple[Evidence, ...],
    part: nn.Module | None,
    threshold: Tensor | None,
    softness: float,
    sample: bool,
) -> tuple[TokenState, tuple[Evidence, ...]]:
    """`take_step` for tokens that stay in their slots. The new state has the mask and this step's counts.

    threshold: the stage's parameter, or None. softness: width of the soft comparison with the threshold, in units of
    the score. sample: draw the decisions of learned scores at random instead of taking the best.
    """
    stage, entry = step.stage, step.verb
    patches_BnC = state.tokens_BNC[:, prefix_tokens:]
    present_Bn = state.present_Bn
    away, memory_Bn = state.away, state.memory_Bn
    with full_precision(patches_BnC):
        if present_Bn is None:
            present_Bn = torch.ones(patches_BnC.shape[:2], dtype=torch.float32, device=patches_BnC.device)
        size_Bn = state.size_Bn
        place_Bn2, options = state.place_Bn2, step.options
        if entry.merges and size_Bn is None:
            size_Bn = torch.ones_like(present_Bn)
        kept_B = kept_of_each(stage, present_Bn)
        stays_Bn = None
        if entry.ranks:
            assert own.scores_Bn is not None
            if threshold is not None:
                # learned scores need gradients. Scores from attention are detached: at AS-ViT's temperature their
                # gradients are 10^4 times as large as the others that reach the attention, and accuracy falls (digits,
                # one epoch towards 0.8 of the MACs: 94.5 % with them, 97.2 % without)
                scores_Bn = own.scores_Bn if stage.learns_to_score else own.scores_Bn.detach()
                stays_Bn = above(scores_Bn, threshold.float(), present_Bn, softness)
            elif sample and stage.learns_to_score:
                stays_Bn = draw(own.scores_Bn, present_Bn)
            else:
                stays_Bn = best(own.scores_Bn, present_Bn, kept_B) * present_Bn
        scene = MaskedInput(
            patches_BnC,
            own.scores_Bn,
            own.keys_BnD,
            size_Bn,
            present_Bn,
            stays_Bn,
            kept_B,
            None if threshold is None else threshold.float(),  # as scores and masks, also in a model in float64
            softness,
            part,
            prefix_tokens,
        )
        assert entry.masked is not None, "resolve refuses it"
        joining = entry.masked(scene, **options)
        if isinstance(joining, Pooled):
            patches_BnC = joining.patches_BKC.to(patches_BnC.dtype)
            if size_Bn is not None:
                size_Bn = equal_sizes(size_Bn * present_Bn, patches_BnC.shape[1])
            if place_Bn2 is not None:
                place_Bn2 = centre(place_Bn2, patches_BnC.shape[1], present_Bn.detach())
            present_Bn, later = torch.ones_like(patches_BnC[..., 0], dtype=torch.float32), ()
            memory_Bn = None
        else:
            place_Bn2 = None if place_Bn2 is None else _moved(place_Bn2, joining, takes_mean(options))
            joined_BmC = join(patches_BnC, joining)
            if step.until is not None:
                away = (*away, _away(step.until, state, patches_BnC, joining, joined_BmC, adds_own(options)))
            patches_BnC = joined_BmC
            size_Bn = None if size_Bn is None else join_amounts(size_Bn, joining, present_Bn)
            later = tuple(_follow(evidence, joining, present_Bn) for evidence in later)
            if memory_Bn is not None and not (joining.host_Bn is not None and step.until is not None):
                memory_Bn = join_amounts(memory_Bn, joining, present_Bn)  # else guests come back with their own
            present_Bn = _with_fused(joining, present_Bn)
    tokens_BNC = torch.cat([state.tokens_BNC[:, :prefix_tokens], patches_BnC], dim=1)
    counts = (*state.counts, present_Bn.sum(dim=1))
    after = TokenState(tokens_BNC, size_Bn, (), present_Bn, counts, None, place_Bn2, None, away, memory_Bn)
    return after, later


def _away(until: int, state: TokenState, patches_BnC: Tensor, joining: Joining, joined_BmC: Tensor, adds: bool) -> Away:
    """What brings the tokens back that a step takes away. joined_BmC: the slots after it."""
    slots_Bn = torch.arange(patches_BnC.shape[1], device=patches_BnC.device).expand(patches_BnC.shape[:2])
    stays_Bn, host_Bn = joining.stays_Bn, joining.host_Bn
    before = Away(
        until,
        patches_BnC,
        index_Bn=slots_Bn,
        stays_Bn=stays_Bn,
        size_Bn=state.size_Bn,
        present_Bn=state.present_Bn,
        place_Bn2=state.place_Bn2,
        memory_Bn=state.memory_Bn,
    )
    if joining.guest_share_Bn is None:
        return before
    if host_Bn is None:
        host_Bn = torch.full_like(slots_Bn, patches_BnC.shape[1])
    if not adds:
        return before._replace(host_Bn=host_Bn)
    return before._replace(
        host_Bn=host_Bn,
        own_BnC=patches_BnC - joined_BmC[:, : patches_BnC.shape[1]],
        host_own_BnC=patches_BnC - gather(joined_BmC, host_Bn),
    )


def compact(
    state: TokenState, prefix_tokens: int, later: tuple[Evidence, ...]
) -> tuple[TokenState, tuple[Evidence, ...]]:
    """Move the present tokens to the front, in order, and cut all images to the largest count in the batch.

    When all images have the same count, the new state has no mask. Waits for the device.
    """
    present_Bn = state.present_Bn
    if present_Bn is None:
        return state, later
    if not len(present_Bn):  # no images, so there is no largest count
        return state._replace(present_Bn=None), later
    count_B = (present_Bn > 0).sum(dim=1)
    fewest, most = (int(count) for count in torch.stack([count_B.min(), count_B.max()]).tolist())
    if fewest == present_Bn.shape[1]:
        return state._replace(present_Bn=None), later
    order_Bn = (present_Bn == 0).to(torch.int64).sort(dim=1, stable=True).indices
    order_BK = order_Bn[:, :most]
    patches_BKC = gather(state.tokens_BNC[:, prefix_tokens:], order_BK)
    return (
        state._replace(
            tokens_BNC=torch.cat([state.tokens_BNC[:, :prefix_tokens], patches_BKC], dim=1),
            size_Bn=None if state.size_Bn is None else state.size_Bn.gather(1, order_BK),
            present_Bn=None if fewest == most else present_Bn.gather(1, order_BK),
            place_Bn2=None if state.place_Bn2 is None else gather(state.place_Bn2, order_BK),
            memory_Bn=None if state.memory_Bn is None else state.memory_Bn.gather(1, order_BK),
            away=(*state.away[:-1], *(_followed(away, order_Bn, most) for away in state.away[-1:])),
        ),
        tuple(
            evidence._replace(
                scores_Bn=None if evidence.scores_Bn is None else evidence.scores_Bn.gather(1, order_BK),
                keys_BnD=None if evidence.keys_BnD is None else gather(evidence.keys_BnD, order_BK),
            )
            for evidence in later
        ),
    )


def _followed(away: Away, order_Bn: Tensor, most: int) -> Away:
    """What brings tokens back, after the slots that went on were put in another order and cut."""
    slots_Bn = torch.arange(order_Bn.shape[1], device=order_Bn.device).expand_as(order_Bn)
    place_Bn = placed(slots_Bn, order_Bn, order_Bn.shape[1]).clamp_max(most - 1)
    host_Bn = None if away.host_Bn is None else place_Bn.gather(1, away.host_Bn)
    assert away.index_Bn is not None
    return away._replace(index_Bn=place_Bn.gather(1, away.index_Bn), host_Bn=host_Bn)


class Group(NamedTuple):
    """Images of a batch that run together. places_B: their indices in the batch; None for the whole batch."""

    places_B: Tensor | None
    state: TokenState


def split_by_count(group: Group, prefix_tokens: int, most: int) -> list[Group]:
    """Split a group into at most `most` groups of images with similar counts, each padded to its own largest count.

    Images are sorted by count and cut where that saves most padding. A cut that saves less than LEAST_SAVED of the
    slots is not made. Waits for the device.
    """
    state = group.state
    if state.present_Bn is None or most < 2:
        return [group]
    count_B = (state.present_Bn > 0).sum(dim=1)
    sorted_B, order_B = count_B.sort(stable=True)
    cuts = _cuts([count + prefix_tokens for count in sorted_B.tolist()], most)
    state = state._replace(bias_B11N=None, found=None)  # they are computed again
    groups = []
    for places_B in order_B.tensor_split(cuts):
        part = _of_images(state, places_B)
        part, evidence = compact(part, prefix_tokens, part.evidence)
        own = places_B if group.places_B is None else group.places_B[places_B]
        groups.append(Group(own, part._replace(evidence=evidence)))
    return groups


def _of_images(value: Any, places_B: Tensor) -> Any:
    """A state, or a part of one, for some images of its batch."""
    if isinstance(value, Tensor):
        return value[places_B]
    if not isinstance(value, tuple):
        return value
    parts = [_of_images(part, places_B) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def join_groups(groups: Sequence[Group], prefix_tokens: int) -> TokenState:
    """Join groups to one state for the whole batch, in its original order, padded to the largest count.

    Evidence is not joined.
    """
    if len(groups) == 1 and groups[0].places_B is None:
        return groups[0].state
    places_B = torch.cat([group.places_B for group in groups])  # type: ignore[misc]
    back_B = places_B.argsort()
    states = [_all_given(group.state, prefix_tokens) for group in groups]
    merged = any(group.state.size_Bn is not None for group in groups)
    unplaced = any(group.state.place_Bn2 is None for group in groups)
    forgotten = any(group.state.memory_Bn is None for group in groups)
    return TokenState(
        _joined([state.tokens_BNC for state in states], back_B),
        _joined([state.size_Bn for state in states], back_B) if merged else None,
        present_Bn=_joined([state.present_Bn for state in states], back_B),
        counts=_joined([state.counts for state in states], back_B),
        place_Bn2=None if unplaced else _joined([state.place_Bn2 for state in states], back_B),
        away=_joined([state.away for state in states], back_B),
        memory_Bn=None if forgotten else _joined([state.memory_Bn for state in states], back_B),
    )


def _all_given(state: TokenState, prefix_tokens: int) -> TokenState:
    """The state with presence and sizes written out, also before the steps whose tokens will come back.

    Groups differ in whether these are None.
    """
    present_Bn, size_Bn = _written_out(state.tokens_BNC[:, prefix_tokens:], state.present_Bn, state.size_Bn)
    away = []
    for one in state.away:
        there_Bn, sizes_Bn = _written_out(one.patches_BnC, one.present_Bn, one.size_Bn)
        away.append(one._replace(present_Bn=there_Bn, size_Bn=None if one.size_Bn is None else sizes_Bn))
    return state._replace(present_Bn=present_Bn, size_Bn=size_Bn, away=tuple(away))


def _written_out(patches_BnC: Tensor, present_Bn: Tensor | None, size_Bn: Tensor | None) -> tuple[Tensor, Tensor]:
    there_Bn = torch.ones_like(patches_BnC[..., 0], dtype=torch.float32) if present_Bn is None else present_Bn
    return there_Bn, torch.ones_like(there_Bn) if size_Bn is None else size_Bn


def _joined(values: Sequence[Any], back_B: Tensor) -> Any:
    """The same value of all groups for the whole batch; tokens are padded to the largest number."""
    first = values[0]
    if isinstance(first, Tensor):
        if first.ndim > 1:
            most = max(value.shape[1] for value in values)
            values = [F.pad(value, (0, 0) * (value.ndim - 2) + (0, most - value.shape[1])) for value in values]
        return torch.cat(list(values))[back_B]
    if not isinstance(first, tuple):
        return first
    parts = [_joined(part, back_B) for part in zip(*values, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def _cuts(counts: list[int], most: int) -> list[int]:
    """Where to cut ascending counts. Cuts are chosen one after another, each where it saves most slots."""
    cuts: list[int] = []
    slots = len(counts) * counts[-1]
    while len(cuts) < most - 1:
        edges = [0, *sorted(cuts), len(counts)]
        saved, where = max(
            (
                ((cut - low) * (counts[high - 1] - counts[cut - 1]), cut)
                for low, high in itertools.pairwise(edges)
                for cut in range(low + 1, high)
            ),
            default=(0, 0),
        )
        if saved < LEAST_SAVED * slots:
            break
        cuts.append(where)
    return sorted(cuts)


def kept_of_each(stage: Stage, present_Bn: Tensor) -> Tensor:
    """How many tokens the stage keeps in each image, (B,), rounded as in `resolve`."""
    most = present_Bn.shape[1]
    fewest = REDUCERS[stage.reduce].fewest_kept
    kept = [max(min(count_of(stage, present), present), fewest(present)) for present in range(most + 1)]
    table = torch.tensor(kept, dtype=torch.int64).to(present_Bn.device, non_blocking=True)
    return table[(present_Bn > 0).sum(dim=1)]


def join(values_BnC: Tensor, joining: Joining) -> Tensor:
    """Apply a joining to the features of tokens. Keeps the dtype."""
    if joining.guest_share_Bn is None:
        return values_BnC
    shared_BnC = values_BnC.float() * joining.guest_share_Bn[..., None]
    if joining.host_Bn is None:
        extra_B1C = shared_BnC.sum(dim=1, keepdim=True).to(values_BnC.dtype)
        return torch.cat([values_BnC, extra_B1C], dim=1)
    assert joining.host_share_Bn is not None
    own_BnC = values_BnC.float() * joining.host_share_Bn[..., None]
    host_BnC = joining.host_Bn[..., None].expand_as(shared_BnC)
    return own_BnC.scatter_add(1, host_BnC, shared_BnC).to(values_BnC.dtype)


def join_amounts(amount_Bn: Tensor, joining: Joining, present_Bn: Tensor) -> Tensor:
    """Apply a joining to amounts, which add up where tokens join (sizes; attention received)."""
    if joining.guest_share_Bn is None:
        return amount_Bn
    guest_Bn = present_Bn - joining.stays_Bn if joining.size_share_Bn is None else joining.size_share_Bn
    if joining.host_Bn is None:
        return torch.cat([amount_Bn, (amount_Bn * guest_Bn).sum(dim=1, keepdim=True)], dim=1)
    return amount_Bn.scatter_add(1, joining.host_Bn, amount_Bn * guest_Bn)


def join_largest(amount_Bn: Tensor, joining: Joining) -> Tensor:
    """Apply a joining to non-negative amounts; where tokens join, the largest of them stays."""
    if joining.guest_share_Bn is None:
        return amount_Bn
    guests_Bn = amount_Bn * (joining.guest_share_Bn > 0)
    if joining.host_Bn is None:
        return torch.cat([amount_Bn, guests_Bn.amax(dim=1, keepdim=True)], dim=1)
    return amount_Bn.scatter_reduce(1, joining.host_Bn, guests_Bn, "amax")


def _moved(place_Bn2: Tensor, joining: Joining, mean: bool) -> Tensor:
    """Apply a joining to places. mean: where tokens join, their mean, weighted as their features; else the host's.

    Places carry no gradients to the decisions. The token that the others form lies at their mean.
    """
    if joining.guest_share_Bn is None or (joining.host_Bn is not None and not mean):
        return place_Bn2
    share_Bn = joining.guest_share_Bn.detach()
    if joining.host_Bn is None:
        return torch.cat([place_Bn2, weighted_mean(place_Bn2, share_Bn)], dim=1)
    assert joining.host_share_Bn is not None
    return join(place_Bn2, joining._replace(guest_share_Bn=share_Bn, host_share_Bn=joining.host_share_Bn.detach()))


def _with_fused(joining: Joining, present_Bn: Tensor) -> Tensor:
    if joining.guest_share_Bn is None or joining.host_Bn is not None:
        return joining.stays_Bn
    some_B1 = ((present_Bn - joining.stays_Bn).detach().sum(dim=1, keepdim=True) > 0).to(present_Bn.dtype)
    return F.pad(joining.stays_Bn, (0, 1)) + F.pad(some_B1, (joining.stays_Bn.shape[1], 0))


def _follow(evidence: Evidence, joining: Joining, present_Bn: Tensor) -> Evidence:
    scores_Bn, keys_BnD = evidence.scores_Bn, evidence.keys_BnD
    if scores_Bn is not None and evidence.takes_largest:
        scores_Bn = join_largest(scores_Bn, joining)
    elif scores_Bn is not None:
        scores_Bn = join_amounts(scores_Bn, joining, present_Bn)
    return evidence._replace(scores_Bn=scores_Bn, keys_BnD=None if keys_BnD is None else join(keys_BnD, joining))
