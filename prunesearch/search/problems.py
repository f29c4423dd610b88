"""What is wrong with a study file and what it evaluates first: known before any worker starts."""

from __future__ import annotations

from prunesearch.config import StudyConfig
from prunesearch.errors import UserError
from prunesearch.evaluate import METRICS, model_shape
from prunesearch.presets import find_schedule
from prunesearch.schedule import ModelShape, Schedule, resolve
from prunesearch.search.samplers import SAMPLERS
from prunesearch.space_problems import space_problems


def study_problems(config: StudyConfig) -> list[str]:
    """Everything in a study file that can be known to be wrong without weights or data; `run_study` starts with it.

    Plugins must have been imported. Raises ModelError when the model cannot be built.
    """
    shape = model_shape(config.model)
    problems = space_problems(config.space, shape)
    fields = [(f"objectives[{index}].metric", objective.metric) for index, objective in enumerate(config.objectives)]
    fields += [(f"limits.{name}", name) for name, _ in config.limits]
    fields += [(f"metrics[{index}]", name) for index, name in enumerate(config.metrics)]
    problems += [f"{place}: {METRICS.unknown(name)}" for place, name in fields if name not in METRICS]
    names = [objective.metric for objective in config.objectives]
    if not names or len(set(names)) < len(names):
        problems.append("objectives: possible: one metric or more, each once. Name what the front trades off.")
    problems += _sampler_problems(config) + _start_problems(config, shape)
    if len(config.rungs) != 1:
        problems.append(f"rungs: there are {len(config.rungs)}; possible: one budget. Keep one of them.")
    return problems


def _sampler_problems(config: StudyConfig) -> list[str]:
    name, trials = config.sampler.name, config.stop.trials
    if name not in SAMPLERS:
        return [f"sampler.name: {SAMPLERS.unknown(name)}"]
    most = SAMPLERS[name].most_trials
    if most is None or (trials is not None and trials <= most):
        return []
    return [
        f"stop.trials: {trials}, but {name} takes several seconds for each proposal beyond {most}. "
        f"Possible: up to {most}. Lower it, or take sampler tpe."
    ]


def _start_problems(config: StudyConfig, shape: ModelShape) -> list[str]:
    problems = []
    for index, name in enumerate(config.space.start_from):
        try:
            resolve(find_schedule(name, shape), shape)
        except UserError as error:
            problems.append(f"space.start_from[{index}]: {error}")
    return problems


def anchors_of(config: StudyConfig, shape: ModelShape) -> list[tuple[str, Schedule]]:
    """What is evaluated first, whatever the limits: the dense model and the start schedules, by origin."""
    starts = [(f"start: {name}", find_schedule(name, shape)) for name in config.space.start_from]
    return [("dense", Schedule()), *starts]
