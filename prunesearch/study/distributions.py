"""Parameters of a space as Optuna parameters and distributions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from prunesearch.config import SpaceConfig
from prunesearch.space.choices import Choice, Dimension, Value, dimensions


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's log messages and ExperimentalWarning within the block."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def parameters_and_distributions(
    space: SpaceConfig, parameters: Mapping[str, Value] | None
) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """Parameters and distributions for an Optuna trial; both empty when `parameters` is None (outside the space)."""
    if parameters is None:
        return {}, {}
    return dict(parameters), {name: distribution_of(dimension) for name, dimension in dimensions(space).items()}


def distribution_of(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    return FloatDistribution(dimension.low, dimension.high, step=dimension.step, log=dimension.log)
