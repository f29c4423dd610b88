"""What a scorer and a reducer are, and the two registries that hold them.

A scorer says which patch tokens matter; a reducer says what becomes of those that do not stay. Ours stand in two
tables, `scores.py` and `verbs.py`, which import nothing heavy: an entry names its functions, each in a file of this
folder, and they are loaded when they run. A plug-in decorates its functions with `scorer` and `reducer`.
The cost model, the runtime, the search space, `prunesearch list` and the contract tests all read these entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from prunesearch.config import Scalar
from prunesearch.registry import Named, Registry, lazily
from prunesearch.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunesearch.tokens.inputs import Grouping, Joining, Pooled

INPUTS = dict.fromkeys(
    ("Attended", "Grouping", "Joining", "MaskedInput", "Pooled", "ReduceInput", "ScoreInput"),
    "prunesearch.tokens.inputs",
)
__getattr__ = lazily(__name__, INPUTS)  # plug-ins may import them from here

Score: TypeAlias = "Callable[..., Tensor]"
"""(ScoreInput, **options) -> scores_Bn: fp32, non-negative, higher stays."""
Reduce: TypeAlias = "Callable[..., Grouping | Pooled]"
"""(ReduceInput, **options) -> Grouping or Pooled."""
ReduceMasked: TypeAlias = "Callable[..., Joining | Pooled]"
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


def load_functions() -> None:
    """Load the functions of all entries that stand here by name, so that torch.compile meets loaded ones."""
    entries: list[Scorer | Reducer] = [*SCORERS.values(), *REDUCERS.values()]
    for entry in entries:
        for value in vars(entry).values():
            if isinstance(value, Named):
                value.function  # noqa: B018  (loads it)


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]
