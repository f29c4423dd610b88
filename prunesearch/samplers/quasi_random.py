"""The first candidates of some samplers: points that fill the space evenly, by Sobol's sequence, scrambled by the seed.

The sequence is SciPy's. Optuna's QMCSampler takes no choices without an order, and its next point depends on what the
process asked before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from prunesearch.config import SamplerConfig, SpaceConfig
from prunesearch.samplers.proposer import SAMPLERS
from prunesearch.space.choices import Choice, Dimension, Value, dimensions

REDRAWS = 64
"""Points for one candidate, when some are impossible or over the limits."""


def count_of(sampler: SamplerConfig, space: SpaceConfig) -> int:
    """How many candidates of a study come from here: `startup` of them; where the study file does not say, the
    sampler's default or the number of parameters, whichever is larger. With twice as many the model began too late."""
    entry = SAMPLERS[sampler.name]
    if not entry.quasi_random_startup:
        return 0
    return max(entry.startup, len(dimensions(space))) if sampler.startup is None else sampler.startup


def points(sampler: SamplerConfig, space: SpaceConfig, index: int) -> Iterator[dict[str, Value]]:
    """The points that may become the index-th candidate, the first choice first. No point comes twice, nor for two
    indices."""
    from scipy.stats.qmc import Sobol

    ranges, count = dimensions(space), count_of(sampler, space)
    if not ranges or index >= count:
        return
    # of the sequence, any aligned part whose length is a power of two is as even as the beginning
    part = 2 ** math.ceil(math.log2(count))
    sequence = Sobol(len(ranges), scramble=True, seed=sampler.seed)
    if index > 0:  # SciPy refuses to go forward by 0
        sequence.fast_forward(index)
    for _ in range(REDRAWS):
        position = map(float, sequence.random(1)[0])
        if part > 1:
            sequence.fast_forward(part - 1)
        yield {name: _value(ranges[name], at) for name, at in zip(ranges, position, strict=True)}


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
