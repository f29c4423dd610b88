"""Ask a plain Optuna trial for a schedule of a search space. Used by the benchmarks that compare with Optuna."""

from __future__ import annotations

import optuna

from prunesearch.config import SpaceConfig
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape
from prunesearch.space.choices import Choice, Value, dimensions, schedule_from


def suggest(trial: optuna.trial.BaseTrial, space: SpaceConfig, shape: ModelShape) -> Schedule:
    """Suggest every parameter of the space with a trial. Raises ScheduleError for an impossible combination."""
    parameters: dict[str, Value] = {}
    for name, dimension in dimensions(space).items():
        if isinstance(dimension, Choice):
            parameters[name] = trial.suggest_categorical(name, dimension.values)
        else:
            low, high, step, log = dimension.low, dimension.high, dimension.step, dimension.log
            parameters[name] = trial.suggest_float(name, low, high, step=step, log=log)
    return schedule_from(parameters, space, shape)
