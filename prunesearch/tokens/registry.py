"""`Scorer` and `Reducer`, and the two registries that hold them.

A scorer ranks the patch tokens. A reducer (verb) decides what happens to those that do not stay. Ours are entries of
two tables, `scores.py` and `verbs.py`, which import nothing heavy: an entry names its functions, and they are loaded
when they run. A plug-in decorates its functions with `scorer` and `reducer`.
The cost model, the models, the search space, `prunesearch list` and the contract tests all read these entries.
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

INPUTS = {
    **dict.fromkeys(
        ("Attended", "Grouping", "Joining", "MaskedInput", "Pooled", "ReduceInput", "ScoreInput"),
        "prunesearch.tokens.inputs",
    ),
    "top_k": "prunesearch.tokens.select",
}
__getattr__ = lazily(__name__, INPUTS)  # plug-ins may import them from here

Score: TypeAlias = "Callable[..., Tensor]"
"""(ScoreInput, **options) -> scores_Bn: fp32, non-negative, higher stays."""
Reduce: TypeAlias = "Callable[..., Grouping | Pooled]"
"""(ReduceInput, **options) -> Grouping or Pooled."""
ReduceMasked: TypeAlias = "Callable[..., Joining | Pooled]"
"""(MaskedInput, **options) -> Joining or Pooled."""


@dataclass(frozen=True)
class Scorer:
    """A registered scorer: its function, and the facts that other code needs."""

    name: str
    function: Score
    summary: str
    source: str
    needs_attention: bool = True
    needs_class_token: bool = False
    macs: Callable[[ModelShape, int], int] = lambda shape, tokens: 0
    """(shape, tokens in the attention it reads, prefix included) -> MACs per image. A scorer that reads no attention
    gets (shape, patch tokens it scores). Must be a polynomial, because it is also called with tensors of counts."""
    part: Callable[[ModelShape], nn.Module] | None = None
    """Makes the learned module of one stage, for scorers that learn."""
    options: Mapping[str, Scalar] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The possible values of each option that is a string."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The least and the greatest value of each option that is a number."""

    def learns(self, shape: ModelShape) -> bool:
        """Whether its stages have a learned part."""
        return self.part is not None

    def unit(self, shape: ModelShape) -> float:
        """A typical score, the unit of changes to thresholds: 1 / patch tokens, because scores are shares of a sum over
        the tokens; 1 for learned scores, which are probabilities."""
        return 1.0 if self.part is not None else 1.0 / shape.patch_tokens


@dataclass(frozen=True)
class Reducer:
    """A registered reducer (verb): its function, and the facts that other code needs.

    ranks: it needs a score. needs_keys: it reads the keys of the attention.
    merges: tokens get a size, by which later attention and average pooling may weight them.
    extra_tokens: how many tokens it adds to the kept ones. fewest_kept: present tokens -> the fewest it can keep.
    masked: the same for tokens that stay in their slots, used for training with learned decisions and for counts that
    differ between images. None: the verb cannot be used there. takes_threshold: a stage may have a threshold.
    holds: in a model with a feature map, tokens that do not stay keep their place and skip the MLP until the next
    stage, which chooses among all tokens again.
    on_tokens: of a verb that holds, for models without a feature map: its options -> the verb, and its options, that
    does the same there with `until` at the next stage. None: the verb is for feature maps only.
    pools: it replaces all tokens by new ones. A search may give it a count (`space.tokens`). Scores and keys that an
    attention layer gave before are lost.
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
    on_tokens: Callable[[Mapping[str, Scalar]], tuple[str, Mapping[str, Scalar]]] | None = None
    pools: bool = False
    part: Callable[[ModelShape, int], nn.Module] | None = None
    """(shape, tokens kept) -> the learned module of one stage, for reducers that learn. A reducer that holds has one
    for each block until the next stage."""
    options: Mapping[str, Scalar] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The possible values of each option that is a string."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The least and the greatest value of each option that is a number."""
    no_effect: Callable[[ModelShape], tuple[str, ...]] = lambda shape: ()
    """(shape) -> options that have no effect on this model. Schedules that differ only in them count as the same."""

    def fits(self, shape: ModelShape) -> bool:
        """Whether models of this kind take the verb."""
        return self.holds == shape.holds or self.on_tokens is not None

    def learns(self, shape: ModelShape) -> bool:
        """Whether its stages have a learned part in models of this kind."""
        return self.part is not None and self.holds == shape.holds


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
    """Load the functions of all entries, so that torch.compile does not have to trace an import."""
    entries: list[Scorer | Reducer] = [*SCORERS.values(), *REDUCERS.values()]
    for entry in entries:
        for value in vars(entry).values():
            if isinstance(value, Named):
                value.function  # noqa: B018  (loads it)


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]
