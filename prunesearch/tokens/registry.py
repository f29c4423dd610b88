"""What a scorer and a reducer are, and the two registries that hold them.

A scorer says which patch tokens matter; a reducer says what becomes of those that do not stay. Each is one
function in a file of this folder with one of the decorators below, and one import line in `__init__.py`.
The cost model, the runtime, the search space, `prunesearch list` and the contract tests all read these entries.

Letters in tensor names: B images, N tokens, n patch tokens, K kept, G guests (patch tokens that do not stay),
H heads, D head dimension, C embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from prunesearch.config import Scalar
from prunesearch.registry import Registry
from prunesearch.schedule import ModelShape


class Attended(NamedTuple):
    """What one attention layer leaves for scorers: everything after q/k norm, before the output projection.

    `bias_B11N` was added to the logits (log sizes of merged tokens), or None. The first `class_tokens` of the
    `prefix_tokens` are class and distillation token.
    """

    query_BHND: Tensor
    key_BHND: Tensor
    value_BHND: Tensor
    output_BHND: Tensor
    bias_B11N: Tensor | None
    scale: float
    prefix_tokens: int
    class_tokens: int


class ScoreInput(NamedTuple):
    """What a scorer may look at. `attended` is None for scorers that declare needs_attention=False."""

    patches_BnC: Tensor
    attended: Attended | None
    block: int
    training: bool


class ReduceInput(NamedTuple):
    """What a reducer may look at. `scores_Bn` is None for verbs that do not rank, `keys_BnD` (mean over heads)
    unless the reducer declares needs_keys, `size_Bn` as long as no stage has merged."""

    patches_BnC: Tensor
    scores_Bn: Tensor | None
    keys_BnD: Tensor | None
    size_Bn: Tensor | None
    kept: int


class Grouping(NamedTuple):
    """Who stays and who joins whom, as a sparse linear map from n patch tokens to the next ones.

    kept_BK: indices of the tokens that stay, ascending (image order). guests_BG: the others, None when they are
    dropped. Token j of the result is host_share[j] * x[kept[j]] + sum of guest_share[g] * x[guests[g]] over the
    guests with host[g] == j. With host_BG None, all guests form one token that is appended.
    """

    kept_BK: Tensor
    guests_BG: Tensor | None = None
    host_BG: Tensor | None = None
    guest_share_BG: Tensor | None = None
    host_share_BK: Tensor | None = None


Score = Callable[..., Tensor]
"""(ScoreInput, **options) -> scores_Bn: fp32, non-negative, higher stays."""
Reduce = Callable[..., Grouping]
"""(ReduceInput, **options) -> Grouping."""


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
    """(shape, tokens in the attention it reads, prefix included) -> MACs per image."""
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Reducer:
    """A registered reducer and what the other layers must know of it.

    ranks: needs a score. needs_keys: reads the attention's keys. merges: tokens get a size, which later attention
    and average pooling may weigh. extra_tokens: tokens it adds to the kept ones.
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
    """(shape, patch tokens before, kept) -> MACs per image."""
    options: Mapping[str, Scalar] = field(default_factory=dict)


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
