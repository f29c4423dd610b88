"""The first candidates of samplers auto and token_gp: points that fill the space evenly, by Sobol's sequence, scrambled
by the seed.

SciPy's, since the one in Optuna takes no choices without an order, and its next point depends on what a process asked
before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from prunesearch.config import StudyConfig
from prunesearch.samplers.optuna_samplers import TOKEN_GP
from prunesearch.space.choices import Choice, Dimension, Value, dimensions

FEWEST = 10
"""Candidates from here in small spaces; in others as many as there are parameters. With twice as many and more, the
model begins too late."""
REDRAWS = 64
"""Points for one candidate, when some are impossible or over the limits."""


def count_of(config: StudyConfig) -> int:
    """How many candidates of a study come from here."""
    if config.sampler.name not in ("auto", TOKEN_GP):
        return 0
    startup = config.sampler.startup
    return max(FEWEST, len(dimensions(config.space))) if startup is None else startup


def points(config: StudyConfig, index: int) -> Iterator[dict[str, Value]]:
    """What may become the index-th candidate, the first choice first: none twice, and none for another index."""
    from scipy.stats.qmc import Sobol

    space, count = dimensions(config.space), count_of(config)
    if not space or index >= count:
        return
    # an aligned part of the sequence of a power of two is as even as its beginning
    part = 2 ** math.ceil(math.log2(count))
    sequence = Sobol(len(space), scramble=True, seed=config.sampler.seed)
    if index > 0:  # SciPy cannot go forward by nothing
        sequence.fast_forward(index)
    for _ in range(REDRAWS):
        position = map(float, sequence.random(1)[0])
        if part > 1:
            sequence.fast_forward(part - 1)
        yield {name: _value(space[name], at) for name, at in zip(space, position, strict=True)}


def _value(dimension: Dimension, position: float) -> Value:
    """The value at a position in [0, 1)."""
    if isinstance(dimension, Choice):
        return dimension.values[int(position * len(dimension.values))]
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.log:
        return math.exp(math.log(low) + position * (math.log(high) - math.log(low)))
    if step is None:
        return low + position * (high - low)
    return low + int(position * (round((high - low) / step) + 1)) * step
