"""What a sampler is: an entry of the registry with its facts, and the proposer that it makes for one search."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prunesearch.config import Objective, SpaceConfig, Target
from prunesearch.evaluate.limits import Limits
from prunesearch.registry import Registry
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape
from prunesearch.space.choices import Value


class Proposer(Protocol):
    """What a sampler knows of one search: its candidates and their results.

    A proposal depends on what was added and told, in which order, and on the seed; not on earlier questions.
    """

    def add(self, uid: str, parameters: Mapping[str, Value]) -> None:
        """A candidate runs now. It has every parameter of the space, as `space.choices.parameters_of` gives them."""

    def tell(self, uid: str, values: Sequence[float] | None, excess: Mapping[str, float]) -> None:
        """The result of a candidate that was added; results of others are ignored.

        values: in the order and the units of the objectives; None when the candidate failed. excess: by how much each
        limited metric breaks its limit; 0 or less is within it.
        """

    def draw(self, seed: int) -> dict[str, Value]:
        """One proposal. It becomes a candidate only when it is added."""
        ...


@dataclass(frozen=True)
class ProposerSettings:
    """What a proposer is made with.

    sampler: the entry that makes it. startup: candidates before its model takes over. build: uid and schedule of the
    candidate that parameters stand for, None when they stand for none. seen: uids of candidates; there is no need to
    propose them again.
    """

    sampler: Sampler
    startup: int
    space: SpaceConfig
    objectives: Sequence[Objective]
    limits: Limits
    target: Target
    shape: ModelShape
    build: Callable[[Mapping[str, Value]], tuple[str, Schedule] | None]
    seen: Container[str]


@dataclass(frozen=True)
class Handover:
    """To which sampler another one leaves a study: from so many candidates on, or with more than so many workers."""

    to: str
    candidates: int
    workers: int


@dataclass(frozen=True)
class Sampler:
    """A registered sampler."""

    name: str
    summary: str
    make: Callable[[ProposerSettings], Proposer]
    draws: int = 25
    """Questions for one candidate before simpler ways take over. Samplers repeat themselves once they are sure."""
    startup: int = 10
    """Candidates before a model takes over, where the study file does not say."""
    least_startup: int = 0
    """A smaller number in the study file counts as this one."""
    quasi_random_startup: bool = False
    """Whether the first candidates are points that fill the space evenly (`quasi_random.py`)."""
    counts_generations: bool = False
    """Whether it is a genetic algorithm of Optuna, with generations of `startup` candidates."""
    window: int | None = None
    """Finished candidates that it looks at, besides the front; None is all."""
    most_trials: int | None = None
    """Beyond this many candidates a question takes several seconds; None where it does not."""
    handover: Handover | None = None


SAMPLERS: Registry[Sampler] = Registry("sampler")


def in_charge(sampler: Sampler, candidates: int, workers: int) -> Sampler:
    """Which sampler proposes when a study has so many candidates and workers: itself, or the one it leaves it to."""
    handover = sampler.handover
    if handover is None or (candidates < handover.candidates and workers <= handover.workers):
        return sampler
    return SAMPLERS[handover.to]
