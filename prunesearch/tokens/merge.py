"""Reduce: the most similar pairs of tokens merge into one token each; no score is used (ToMe)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunesearch.tokens.inputs import Grouping, Joining, MaskedInput, ReduceInput
from prunesearch.tokens.select import ascending, best, gather, ranked, straight_through, unit


class Pairs(NamedTuple):
    """Guests, the host of each, and all other tokens, in any order."""

    others_BK: Tensor
    guests_BG: Tensor
    host_BG: Tensor


def _first_guest(parity: str, prefix_tokens: int) -> int:
    """Index of the first patch token that looks for a partner. From there on every second one does."""
    return 0 if parity == "all" and prefix_tokens % 2 == 0 else 1


def masked(scene: MaskedInput, *, proportional_attention: bool, parity: str, position: str, returns: str) -> Joining:
    """`merge` for tokens that stay in their slots: among those present, by counts or a threshold on the cosine."""
    keys_BnD, size_Bn, present_Bn = scene.keys_BnD, scene.size_Bn, scene.present_Bn
    assert keys_BnD is not None and size_Bn is not None
    if present_Bn.shape[1] < 2:
        return Joining(present_Bn)
    first = _first_guest(parity, scene.prefix_tokens)
    guests, hosts = slice(first, None, 2), slice(1 - first, None, 2)
    # move the present tokens to the front: odd and even places must not depend on empty slots
    order_Bn = (present_Bn == 0).to(torch.int64).sort(dim=1, stable=True).indices
    unit_BnD = gather(unit(keys_BnD), order_Bn)
    there_Bn = present_Bn.detach().gather(1, order_Bn)
    cosine_BAP = unit_BnD[:, guests] @ unit_BnD[:, hosts].transpose(1, 2)
    cosine_BAP = cosine_BAP.masked_fill(there_Bn[:, None, hosts] == 0, -torch.inf)
    best_BA, partner_BA = cosine_BAP.max(dim=-1)
    candidate_BA = there_Bn[:, guests]
    if scene.threshold is not None:
        # detached: gradients go to the threshold and not to the keys (LTMP trains nothing else)
        soft_BA = ((best_BA.detach() - scene.threshold) / scene.softness).sigmoid()
        joins_BA = straight_through(best_BA > scene.threshold, soft_BA) * candidate_BA
    else:
        assert scene.kept_B is not None
        joins_BA = best(best_BA, candidate_BA, there_Bn.sum(dim=1).round().to(torch.int64) - scene.kept_B)
    guest_Bn = torch.zeros_like(present_Bn).scatter(1, order_Bn[:, guests], joins_BA) * present_Bn
    slots_Bn = torch.arange(present_Bn.shape[1], device=order_Bn.device).expand_as(order_Bn)
    host_Bn = slots_Bn.scatter(1, order_Bn[:, guests], order_Bn[:, hosts].gather(1, partner_BA))
    moved_Bn = guest_Bn * size_Bn
    total_Bn = size_Bn.scatter_add(1, host_Bn, moved_Bn)
    total_Bn = total_Bn.masked_fill(total_Bn == 0, 1.0)  # the slot of a fused token, in images where nothing was fused
    return Joining(
        present_Bn - guest_Bn,
        guest_share_Bn=moved_Bn / total_Bn.gather(1, host_Bn),
        host_Bn=host_Bn,
        host_share_Bn=size_Bn / total_Bn,
        size_share_Bn=guest_Bn,
    )


def merge(scene: ReduceInput, *, proportional_attention: bool, parity: str, position: str, returns: str) -> Grouping:
    """Match every second token to its most similar neighbour set and average the closest pairs, weighted by size.

    Bipartite matching on head-mean keys: patch tokens 1, 3, 5, ... look for a partner among 0, 2, 4, ... The pairs
    with the highest cosine merge, so at most half of the tokens go in one stage. Prefix tokens are not merged.
    proportional_attention: later attention layers add log(size) to the logits (models/transformer.py does this).
    parity: "patches" counts places among the patch tokens. "all" counts them among all tokens, as the released code
    does. With an even number of prefix tokens, 0, 2, 4, ... then look for a partner among 1, 3, 5, ...
    """
    pairs = closest_pairs(scene, parity)
    return Grouping(ascending(pairs.others_BK)[0], pairs.guests_BG, pairs.host_BG, weight_Bn=scene.size_Bn)


def closest_pairs(scene: ReduceInput, parity: str) -> Pairs:
    """The pairs that `merge` joins so that `scene.kept` tokens stay."""
    keys_BnD = scene.keys_BnD
    assert keys_BnD is not None
    tokens = keys_BnD.shape[1]
    first = _first_guest(parity, scene.prefix_tokens)
    unit_BnD = unit(keys_BnD)
    cosine_BAP = torch.bmm(unit_BnD[:, first::2], unit_BnD[:, 1 - first :: 2].transpose(1, 2))
    best_BA, partner_BA = cosine_BAP.max(dim=-1)
    # in image order, with -inf for tokens that look for no partner, so that they rank last and stay
    best_Bn = torch.constant_pad_nd(best_BA[..., None], (first, 1 - first, 0, 1), -torch.inf).flatten(1)[:, :tokens]
    order_Bn = ranked(best_Bn)[1]
    guests_BG, others_BK = order_Bn[:, : tokens - scene.kept], order_Bn[:, tokens - scene.kept :]
    host_BG = partner_BA.gather(1, torch.floor_divide(guests_BG, 2)) * 2
    host_BG = host_BG if first == 1 else host_BG + 1
    return Pairs(others_BK, guests_BG, host_BG)
