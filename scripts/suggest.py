"""Asks a trial of plain Optuna for a candidate of a search space, for the benchmarks that compare with it."""

from __future__ import annotations

import optuna

from prunesearch.config import SpaceConfig
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape
from prunesearch.space.choices import Choice, Value, dimensions, schedule_from


def suggest(trial: optuna.trial.BaseTrial, space: SpaceConfig, shape: ModelShape) -> Schedule:
    """Ask a trial for every parameter. Raises ScheduleError for a combination that cannot be a candidate."""
    parameters: dict[str, Value] = {}
    for name, dimension in dimensions(space).items():
        if isinstance(dimension, Choice):
            parameters[name] = trial.suggest_categorical(name, dimension.values)
        else:
            low, high, step, log = dimension.low, dimension.high, dimension.step, dimension.log
            parameters[name] = trial.suggest_float(name, low, high, step=step, log=log)
    return schedule_from(parameters, space, shape)
