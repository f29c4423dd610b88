"""What a scorer and a reducer are, and the two registries that hold them.

A scorer says which patch tokens matter; a reducer says what becomes of those that do not stay. Each is one
function in a file of this folder with one of the decorators below, and one import line in `__init__.py`.
The cost model, the runtime, the search space, `prunesearch list` and the contract tests all read these entries.

Letters in tensor names: B images, N tokens, n patch tokens, K kept, G guests (patch tokens that do not stay),
H heads, D head dimension, C embedding dimension. Masks are floats, 1 or 0, so that decisions can pass gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from prunesearch.config import Scalar
from prunesearch.registry import Registry
from prunesearch.shape import ModelShape


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


Score = Callable[..., Tensor]
"""(ScoreInput, **options) -> scores_Bn: fp32, non-negative, higher stays."""
Reduce = Callable[..., Grouping | Pooled]
"""(ReduceInput, **options) -> Grouping or Pooled."""
ReduceMasked = Callable[..., Joining | Pooled]
"""(MaskedInput, **options) -> Joining or Pooled."""


@dataclass(frozen=True)
class Scorer:
    """A registered scorer and what the other layers must know of it."""

    name: str
    function: Score
    summary: str
    source: str
    needs_attention: bool = True
    needs_class_token: bool = False
    macs: Callable[[ModelShape, int], int] = lambda shape, tokens: 0
    """(shape, tokens in the attention it reads, prefix included) -> MACs per image. Of a scorer that reads no
    attention: (shape, patch tokens it scores). Must be a polynomial, as it is also called with tensors of counts."""
    part: Callable[[ModelShape], nn.Module] | None = None
    """Makes the learned module of one stage, for scorers that learn."""
    options: Mapping[str, Scalar] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The possible values of each option that is a string."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The least and the greatest value of each option that is a number."""

    def unit(self, shape: ModelShape) -> float:
        """The size of a typical score, in which thresholds are moved: scores are shares of a sum over the tokens,
        learned ones are probabilities."""
        return 1.0 if self.part is not None else 1.0 / shape.patch_tokens


@dataclass(frozen=True)
class Reducer:
    """A registered reducer and what the other layers must know of it.

    ranks: needs a score. needs_keys: reads the attention's keys. merges: tokens get a size, which later attention
    and average pooling may weigh. extra_tokens: tokens it adds to the kept ones. masked: the same on tokens that stay
    in their slots, for training with learned decisions and for counts that differ between images; None: the verb is
    refused there. takes_threshold: a stage may give a threshold. holds: tokens that do not stay keep their place and
    go another way until the next stage, which chooses among all again; for models with a feature map only. pools: all
    tokens are replaced by new ones, as many as asked for. A search may then give it a count (`space.tokens`), and what
    an attention layer saw before says nothing about the new tokens.
    """

    name: str
    function: Reduce
    summary: str
    source: str
    ranks: bool = True
    needs_keys: bool = False
    merges: bool = False
    extra_tokens: int = 0
    fewest_kept: Callable[[int], int] = lambda present: 1
    macs: Callable[[ModelShape, int, int], int] = lambda shape, before, kept: 0
    """(shape, patch tokens before, kept) -> MACs per image; also called with tensors of counts."""
    masked: ReduceMasked | None = None
    takes_threshold: bool = False
    holds: bool = False
    pools: bool = False
    part: Callable[[ModelShape, int], nn.Module] | None = None
    """(shape, tokens kept) -> the learned module of one stage, for reducers that learn; of each block until the next
    stage, for those that hold."""
    options: Mapping[str, Scalar] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The possible values of each option that is a string."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The least and the greatest value of each option that is a number."""
    no_effect: Callable[[ModelShape], tuple[str, ...]] = lambda shape: ()
    """(shape) -> options that change nothing on this model; schedules that differ in those only are the same."""


SCORERS: Registry[Scorer] = Registry("score")
REDUCERS: Registry[Reducer] = Registry("reduce verb")


def scorer(name: str, *, source: str, **facts: object) -> Callable[[Score], Score]:
    """Register a scoring function. `source` is the paper; `facts` are the other fields of `Scorer`."""

    def register(function: Score) -> Score:
        SCORERS.add(name, Scorer(name, function, summary=_first_line(function), source=source, **facts))  # type: ignore[arg-type]
        return function

    return register


def reducer(name: str, *, source: str, **facts: object) -> Callable[[Reduce], Reduce]:
    """Register a reducing function. `source` is the paper; `facts` are the other fields of `Reducer`."""

    def register(function: Reduce) -> Reduce:
        REDUCERS.add(name, Reducer(name, function, summary=_first_line(function), source=source, **facts))  # type: ignore[arg-type]
        return function

    return register


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]
