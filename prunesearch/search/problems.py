"""Checks of a study before any worker starts, and the schedules that it evaluates first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from prunesearch.config import (
    MASKED,
    UNLABELLED,
    BlockSpace,
    Budget,
    FinetuneConfig,
    SpaceConfig,
    StudyConfig,
    study_name_problem,
)
from prunesearch.errors import FileError, ModelError, UserError
from prunesearch.evaluate import METRICS, model_problems, model_shape
from prunesearch.evaluate.limit_problems import limit_problems, resolved_problems
from prunesearch.evaluate.metrics import misread, output_of
from prunesearch.evaluate.sections import channel_problems, source_problems
from prunesearch.evaluate.sensitivity import most_stages, nothing_to_measure, stages_of
from prunesearch.evaluate.shapes import input_channels
from prunesearch.evaluate.siblings import sibling_problems
from prunesearch.evaluate.unreachable_limits import unreachable_limits
from prunesearch.plugins import import_plugins
from prunesearch.presets import find_schedule
from prunesearch.record import SENSITIVITY
from prunesearch.samplers import SAMPLERS
from prunesearch.samplers.iso_budget import budget_problems
from prunesearch.schedule import Schedule, resolve, spelled_out
from prunesearch.search.sensitivity_start import FILE, WORD, kept_sensitivities, predicted_starts
from prunesearch.search.target_device import device_problems, without_predictions
from prunesearch.shape import ModelShape
from prunesearch.space.choices import NEVER, blocks_of, may_return
from prunesearch.space.problems import space_problems
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.tokens import REDUCERS, SCORERS

MOST_STAGES = 20_000
"""Most stages that a sensitivity start may measure. Each one costs a forward pass over the images."""
_NOTHING_OF_ITS_OWN = (
    "in a study whose candidates share all weights; what a schedule learns for itself would never be trained. "
    "Possible: scores and verbs that do not learn, without thresholds. Choose those, or evaluation: finetune."
)


def check_study(
    config: StudyConfig, starts: bool = True, problems: Sequence[str] = (), without_model: bool = False
) -> None:
    """Import the plug-ins of a study and raise FileError with everything that `study_problems` finds.

    problems: further problems that the caller found. without_model: only `model_free_problems`, which need no network.
    """
    import_plugins(config.plugins)
    found = [*(model_free_problems(config) if without_model else study_problems(config, starts)), *problems]
    if found:
        raise FileError(f"study {config.name}", found)


def study_problems(config: StudyConfig, starts: bool = True) -> list[str]:
    """All problems of a study that can be found without weights and data. `run_study` calls this first.

    Plug-ins must be imported. Models in the hub or in a local folder are looked up there.

    starts: also check the start schedules. Not needed for a study that was begun: its storage has them.
    """
    problems = model_free_problems(config)
    if model_problems(config.model):
        return problems
    try:
        shape = model_shape(config.model)
    except ModelError as error:
        return [*problems, str(error)]
    in_space = space_problems(config.space, shape)
    costs = [] if in_space else device_problems(config, shape)
    if costs or (config.device is not None and config.device.table is None):
        config = without_predictions(config)
    costs += [] if in_space else budget_problems(config, shape)
    if not in_space and all(name in METRICS for name, _ in config.limits):
        costs += resolved_problems(config) or unreachable_limits(
            config.space, config.limits, config.target, config.evaluation == "supernet"
        )
    problems = in_space + costs + problems + channel_problems(config.data, input_channels(config.model))
    problems += _learning_problems(config, shape) + _output_problems(config, shape)
    if starts:
        problems += _sensitivity_problems(config.space, shape) if not in_space else []
        problems += _start_problems(config.space, shape, config.evaluation == "supernet")
    return problems


def model_free_problems(config: StudyConfig) -> list[str]:
    """The problems that can be found without the model, which may have to be downloaded."""
    try:
        from_mapping(StudyConfig, to_mapping(config), "study")
    except FileError as error:  # only for a config made in Python; reading a file raises this earlier
        return list(error.problems)
    problems = model_problems(config.model)
    problems += [f"{place}: {METRICS.unknown(name)}" for place, name in _metrics_of(config) if name not in METRICS]
    names = [objective.metric for objective in config.objectives]
    if not names or len(set(names)) < len(names):
        problems.append("objectives: possible: one metric or more, each once. Name what the front trades off.")
    problems += limit_problems(config)
    problems += [problem] if (problem := study_name_problem(config.name)) is not None else []
    problems += source_problems(config.data)
    problems += _sampler_problems(config.sampler.name, config.stop.trials) + _finetune_problems(config.finetune)
    problems += _rung_problems(config.rungs) + _supernet_problems(config)
    return problems + sibling_problems(config)


def _finetune_problems(settings: FinetuneConfig) -> list[str]:
    if settings.cross_entropy_weight != 0 or (settings.distill and settings.distill_weight > 0):
        return []
    return [
        "finetune.cross_entropy_weight: 0, and without distillation no loss knows the classes. Possible: above 0, or "
        "distill: true with a distill_weight above 0. Raise it, or leave it out."
    ]


def _rung_problems(rungs: Sequence[Budget]) -> list[str]:
    if len(rungs) == 1:
        if rungs[0] == Budget():
            return ["rungs[0]: neither images nor seconds. Possible: either or both. For no training: images: 0."]
        return []
    if not rungs:
        return ["rungs: there is none. Possible: one budget or more. For no training: [{images: 0}]."]
    problems = []
    for index, rung in enumerate(rungs):
        if rung.images is None or rung.seconds is not None:
            problems.append(
                f"rungs[{index}]: {_budget_in_words(rung)}, but seconds buy each candidate another training, so that "
                f"several rungs could not be compared. Possible with several rungs: images alone. Give images."
            )
    images = [rung.images for rung in rungs if rung.images is not None]
    if any(larger <= smaller for smaller, larger in itertools.pairwise(images)):
        problems.append(
            f"rungs: {', '.join(map(str, images))} images do not ascend. Possible: each budget larger than the one "
            f"before, of which it is the continuation (0 = as it comes, first only). Put them in order."
        )
    return problems


def _supernet_problems(config: StudyConfig) -> list[str]:
    if config.evaluation == "finetune":
        if config.supernet is None:
            return []
        return ["supernet: given, but evaluation is finetune. Possible: evaluation: supernet. Write that, or leave it."]
    if config.supernet is None:
        return ["supernet: missing, but evaluation is supernet. Possible: supernet: {images: ...}. Write how many."]
    problems = []
    if config.finetune.freeze_backbone > 0:
        problems.append(
            f"finetune.freeze_backbone: {config.finetune.freeze_backbone:g}, but with evaluation supernet nothing else "
            f"learns. Possible: 0. Leave it out."
        )
    return problems


def _budget_in_words(budget: Budget) -> str:
    parts = [f"{value:g} {name}" for name, value in vars(budget).items() if value is not None]
    return " and ".join(parts) or "no images"


def _learning_problems(config: StudyConfig, shape: ModelShape) -> list[str]:
    """Choices that learn, where nothing is trained or the weights are shared."""
    learned, problems = _learned_choices(config.space, shape), []
    if len(config.rungs) > 1 and config.rungs[0].images == 0 and learned:
        problems.append(
            f"rungs[0]: 0 images, but {', '.join(learned)} must be trained to be of use, so that the best of this rung "
            f"would be the best without. Possible: a first budget that trains, or one rung. Raise images."
        )
    if config.evaluation == "supernet" and config.supernet is not None:
        if any("threshold" in block.amount for block in blocks_of(config.space)):
            learned.append("thresholds")
        if learned:
            problems.append(f"space: {', '.join(learned)} {_NOTHING_OF_ITS_OWN}")
    return problems


def _output_problems(config: StudyConfig, shape: ModelShape) -> list[str]:
    """Metrics and losses that the model's output, its tokens at the end or the pictures cannot give."""
    problems = _mask_problems(config, shape)
    if problems:  # what else does not go together follows from it
        return problems
    (has, _), unlabelled = output_of(shape), config.data.name == UNLABELLED
    for place, name in _metrics_of(config):
        if name not in METRICS:
            continue
        metric = METRICS[name]
        misfit = misread(name, shape)
        if misfit is not None:
            problems.append(f"{place}: {misfit}")
        elif metric.needs_labels and unlabelled:
            fitting = ", ".join(n for n, one in METRICS.items() if has in one.of_output and not one.needs_labels)
            problems.append(
                f"{place}: {name} needs labels, and pictures of data {UNLABELLED} have none. Possible: {fitting}, or "
                f"class folders (data folder). Change one of them."
            )
        if metric.needs_places and not shape.holds and _may_end_without_tokens(config.space):
            problems.append(
                f"{place}: {name} compares all patch tokens at the end, but in this space some may be gone. Possible: "
                f"until: [next, end] in the space, with verbs that do not pool. Write that, or leave {name} out."
            )
    if all(rung.images == 0 for rung in config.rungs) and config.evaluation == "finetune":
        return problems
    finetune = config.finetune
    if shape.gives_features and not (finetune.distill and finetune.distill_weight > 0):
        problems.append(
            "finetune.distill: false, but a model without a classifier learns from the dense model's features alone. "
            "Possible: true, with a distill_weight above 0. Write that, or rungs: [{images: 0}]."
        )
    if not shape.gives_features and unlabelled and finetune.cross_entropy_weight != 0:
        problems.append(
            f"finetune.cross_entropy_weight: a cross entropy needs classes, and pictures of data {UNLABELLED} have "
            f"none. Possible: 0, so that the dense model's answers alone are learned. Write cross_entropy_weight: 0."
        )
    return problems


def _mask_problems(config: StudyConfig, shape: ModelShape) -> list[str]:
    """Data that does not go with a head for each patch, or the other way round; and a head that nobody trained."""
    data = config.data.name
    if shape.segments and data in ("", "folder", "digits", UNLABELLED):
        return [
            f"data.name: {data or 'folder'} has no class for each pixel, but the model gives classes to each patch. "
            f"Possible: {', '.join(MASKED)}. Change one of them."
        ]
    if data in MASKED and not shape.segments:
        return [
            f"model.head: absent, but data {data} has a class for each pixel. Possible: linear or conv, with "
            f"num_classes. Write it, or take other data."
        ]
    if config.model.head is not None and config.model.pretrained:
        return [
            f"model.head: a {config.model.head} head is random, as timm's weights have none. Possible: one that was "
            f"trained on this model. Run `prunesearch train-head` on this file, and write its result as "
            f"model.checkpoint instead of pretrained: true."
        ]
    return []


def _metrics_of(config: StudyConfig) -> list[tuple[str, str]]:
    """(where it stands, name) of every metric of a study."""
    fields = [(f"objectives[{index}].metric", objective.metric) for index, objective in enumerate(config.objectives)]
    fields += [(f"limits.{name}", name) for name, _ in config.limits]
    return fields + [(f"metrics[{index}]", name) for index, name in enumerate(config.metrics)]


def _may_end_without_tokens(space: SpaceConfig) -> bool:
    return any(
        NEVER in block.until if may_return(verb) else REDUCERS[verb].pools
        for block in blocks_of(space)
        for verb in block.reduce
        if verb in REDUCERS
    )


def _learned_choices(space: SpaceConfig, shape: ModelShape) -> list[str]:
    """Names of the scores and verbs of a space that have learned parts."""
    parts: list[SpaceConfig | BlockSpace] = [space]
    parts += [block for block in space.blocks if isinstance(block, BlockSpace)]
    scores = {name for part in parts for name in part.score or () if name in SCORERS and SCORERS[name].learns(shape)}
    verbs = {name for part in parts for name in part.reduce or () if name in REDUCERS and REDUCERS[name].learns(shape)}
    return sorted(scores | verbs)


def _sampler_problems(name: str, trials: int | None) -> list[str]:
    if name not in SAMPLERS:
        return [f"sampler.name: {SAMPLERS.unknown(name)}"]
    most = SAMPLERS[name].most_trials
    if most is None or (trials is not None and trials <= most):
        return []
    return [
        f"stop.trials: {trials}, but {name} takes several seconds for each proposal beyond {most}. "
        f"Possible: up to {most}. Lower it, or take sampler tpe."
    ]


def _sensitivity_problems(space: SpaceConfig, shape: ModelShape) -> list[str]:
    if WORD not in space.start_from:
        return []
    place = f"space.start_from[{space.start_from.index(WORD)}]"
    count = most_stages(space)
    if count > MOST_STAGES:
        return [
            f"{place}: {WORD} would measure {count:,} stages, each alone. Possible: up to {MOST_STAGES:,}. Take it "
            f"out, or give fewer blocks, keep ratios, scores or verbs."
        ]
    stages, left_out = stages_of(space, shape)
    return [] if stages else [f"{place}: {nothing_to_measure(left_out)}"]


def _start_problems(space: SpaceConfig, shape: ModelShape, shares_weights: bool) -> list[str]:
    problems = []
    for index, name in enumerate(space.start_from):
        if name == WORD:
            continue
        try:
            start = find_schedule(name, shape)
            resolve(start, shape)
        except UserError as error:
            problems.append(f"space.start_from[{index}]: {error}")
        else:
            if shares_weights and (spelled_out(start, shape).needs_weights or start.is_adaptive):
                problems.append(f"space.start_from[{index}]: {name} learns, {_NOTHING_OF_ITS_OWN}")
    return problems


def start_schedules(config: StudyConfig, shape: ModelShape, folder: Path | None = None) -> list[tuple[str, Schedule]]:
    """(origin, schedule) of what is evaluated first, regardless of limits: the dense model and the start schedules.

    folder: of the study. Its sensitivities are read from there, or measured and saved there. Without a folder the
    schedules predicted from sensitivities are left out.
    """
    starts: list[tuple[str, Schedule]] = []
    for name in config.space.start_from:
        if name != WORD:
            starts.append((f"start: {name}", find_schedule(name, shape)))
        elif folder is not None:
            found = kept_sensitivities(config, folder / FILE)
            starts += [(SENSITIVITY, point.schedule) for point in predicted_starts(config, shape, found)]
    return [("dense", Schedule()), *starts]
