"""Inputs and outputs of scorers and reducers: tuples of tensors.

Letters in tensor names: B images, N tokens, n patch tokens, K kept tokens, G guests (patch tokens that do not stay),
H heads, D head dimension, C embedding dimension. Masks are floats, 1 or 0, so that gradients reach the decisions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Attended(NamedTuple):
    """Tensors of one attention layer, for scorers.

    query, key: after q/k norm. output: before the output projection.
    bias: added to the logits, (B, 1, 1, N): log sizes of merged tokens, -inf for empty slots; or (B or 1, H, N, N),
    with a bias for each pair of places; or None. class_tokens: how many of the first prefix tokens are class and
    distillation tokens. present_Bn: 1 for patch tokens that are present, 0 for removed ones and padding; None when all
    are present. keys_BnD: the patch tokens' keys, mean over heads in fp32; None unless a verb needs them.
    """

    query_BHND: Tensor
    key_BHND: Tensor
    value_BHND: Tensor
    output_BHND: Tensor
    bias: Tensor | None
    scale: float
    prefix_tokens: int
    class_tokens: int
    present_Bn: Tensor | None = None
    keys_BnD: Tensor | None = None


class ScoreInput(NamedTuple):
    """Input of a scorer.

    attended: None for scorers with needs_attention=False. part: the learned module of scorers that learn, else None.
    present_Bn: as in `Attended`. In training it carries gradients to the decisions of earlier stages.
    """

    patches_BnC: Tensor
    attended: Attended | None
    block: int
    training: bool
    present_Bn: Tensor | None = None
    part: nn.Module | None = None


class ReduceInput(NamedTuple):
    """Input of a reducer.

    scores_Bn: None for verbs that do not rank. keys_BnD: mean over heads, for reducers with needs_keys, else None.
    size_Bn: how many patches each token stands for; None while no stage has merged. kept: how many tokens must stay.
    part: the learned module of reducers that learn, else None. prefix_tokens: number of tokens before the patches.
    """

    patches_BnC: Tensor
    scores_Bn: Tensor | None
    keys_BnD: Tensor | None
    size_Bn: Tensor | None
    kept: int
    part: nn.Module | None = None
    prefix_tokens: int = 0


class MaskedInput(NamedTuple):
    """Input of a reducer's masked form: tokens stay in their slots, and some slots are empty.

    present_Bn: 1 where there is a token. stays_Bn: 1 for present tokens that stay. It is None for verbs that do not
    rank: `merge` decides by `kept_B` (how many stay in each image) or by `threshold`. softness: scale of the sigmoid
    that replaces the comparison with the threshold in the backward pass. Other fields as in `ReduceInput`.
    """

    patches_BnC: Tensor
    scores_Bn: Tensor | None
    keys_BnD: Tensor | None
    size_Bn: Tensor | None
    present_Bn: Tensor
    stays_Bn: Tensor | None
    kept_B: Tensor | None = None
    threshold: Tensor | None = None
    softness: float = 1.0
    part: nn.Module | None = None
    prefix_tokens: int = 0


class Grouping(NamedTuple):
    """Output of a reducer: which tokens stay, and which of the others (guests) join which of them (hosts).

    kept_BK: indices of the tokens that stay, ascending (image order). guests_BG: indices of the others; None when they
    are dropped. host_BG: for each guest, the index of its host. A guest that is its own host is dropped.
    guest_weight_BG: fp32; 1 when None.

    Token j of the result is a mean: of x[kept[j]], with own_weight, and of x[guests[g]] for the guests with
    host[g] == kept[j], with guest_weight[g]. With host_BG None, one token is appended: the sum of
    guest_weight[g] * x[guests[g]].

    weight_Bn: fp32; the weight of every token in the mean, that of x[kept[j]] too, instead of own_weight and
    guest_weight.
    size_share_BG: how much of a guest's size goes to its host; all of it when None.
    ordered_BnC: the features of the kept tokens and then of the guests, from verbs that have them already. host_BG is
    then the index of the host among them, which is its place among the kept.
    """

    kept_BK: Tensor
    guests_BG: Tensor | None = None
    host_BG: Tensor | None = None
    guest_weight_BG: Tensor | None = None
    size_share_BG: Tensor | None = None
    ordered_BnC: Tensor | None = None
    weight_Bn: Tensor | None = None
    own_weight: float = 1.0


class Joining(NamedTuple):
    """Output of a reducer's masked form: a `Grouping` for tokens that stay in their slots.

    Slot j of the result is host_share[j] * x[j] + sum of guest_share[g] * x[g] over the slots with host[g] == j.
    stays_Bn: 1 or 0, with gradients. Slots with 0 are empty afterwards. Without guest_share the others are dropped.
    Without host_Bn they form one token in an appended slot, which is empty in images without guests.
    """

    stays_Bn: Tensor
    guest_share_Bn: Tensor | None = None
    host_Bn: Tensor | None = None
    host_share_Bn: Tensor | None = None
    size_share_Bn: Tensor | None = None


class Pooled(NamedTuple):
    """Output of a reducer that pools: K new tokens, which replace all patch tokens."""

    patches_BKC: Tensor
