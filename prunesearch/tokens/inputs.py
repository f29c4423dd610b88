"""What scorers and reducers are given, and what they return: tuples of tensors.

Letters in tensor names: B images, N tokens, n patch tokens, K kept, G guests (patch tokens that do not stay),
H heads, D head dimension, C embedding dimension. Masks are floats, 1 or 0, so that decisions can pass gradients.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Attended(NamedTuple):
    """What one attention layer leaves for scorers: everything after q/k norm, before the output projection.

    `bias_B11N` was added to the logits (log sizes of merged tokens; -inf where there is no token), or None. The first
    `class_tokens` of the `prefix_tokens` are class and distillation token. `present_Bn`: 1 for patch tokens that are
    there, 0 for gone ones and padding; None when all are there.
    """

    query_BHND: Tensor
    key_BHND: Tensor
    value_BHND: Tensor
    output_BHND: Tensor
    bias_B11N: Tensor | None
    scale: float
    prefix_tokens: int
    class_tokens: int
    present_Bn: Tensor | None = None


class ScoreInput(NamedTuple):
    """What a scorer may look at. `attended` is None for scorers that declare needs_attention=False, `part` unless
    they learn. `present_Bn`: as in `Attended`; with gradients to the decisions of former stages while training."""

    patches_BnC: Tensor
    attended: Attended | None
    block: int
    training: bool
    present_Bn: Tensor | None = None
    part: nn.Module | None = None


class ReduceInput(NamedTuple):
    """What a reducer may look at. `scores_Bn` is None for verbs that do not rank, `keys_BnD` (mean over heads)
    unless the reducer declares needs_keys, `size_Bn` as long as no stage has merged, `part` unless it learns.
    `prefix_tokens` stand before the patches and take no part."""

    patches_BnC: Tensor
    scores_Bn: Tensor | None
    keys_BnD: Tensor | None
    size_Bn: Tensor | None
    kept: int
    part: nn.Module | None = None
    prefix_tokens: int = 0


class MaskedInput(NamedTuple):
    """What the masked form of a reducer looks at: tokens stay in their slots, and some slots are empty.

    present_Bn: 1 where there is a token. stays_Bn: 1 for those that stay, at most present_Bn; None for `merge`, which
    decides itself, by `kept_B` (counts) or by `threshold` (then `soft` says how a comparison passes gradients).
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
    """Who stays and who joins whom, as a sparse linear map from n patch tokens to the next ones.

    kept_BK: indices of the tokens that stay, ascending (image order). guests_BG: the others, None when they are
    dropped. Token j of the result is host_share[j] * x[kept[j]] + sum of guest_share[g] * x[guests[g]] over the
    guests with host[g] == j. With host_BG None, all guests form one token that is appended.
    size_share_BG: how much of a guest's size goes to its host; all of it when None.
    """

    kept_BK: Tensor
    guests_BG: Tensor | None = None
    host_BG: Tensor | None = None
    guest_share_BG: Tensor | None = None
    host_share_BK: Tensor | None = None
    size_share_BG: Tensor | None = None


class Joining(NamedTuple):
    """A `Grouping` in place: slot j of the result is host_share[j] * x[j] + sum of guest_share[g] * x[g] over the
    slots with host[g] == j. Slots that do not stay are empty afterwards, whatever they hold.

    stays_Bn: 1 or 0, with gradients. Without guest_share the others are dropped; without host_Bn they form one token
    in a slot that is appended, empty in images without guests.
    """

    stays_Bn: Tensor
    guest_share_Bn: Tensor | None = None
    host_Bn: Tensor | None = None
    host_share_Bn: Tensor | None = None
    size_share_Bn: Tensor | None = None


class Pooled(NamedTuple):
    """K new tokens in the place of all that were there."""

    patches_BKC: Tensor
