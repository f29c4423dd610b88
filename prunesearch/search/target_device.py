"""The `device` section of a study: its profile, what is wrong with it, and measuring it when a search starts."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunesearch.config import IN_ANY_PRECISION, DeviceConfig, StudyConfig
from prunesearch.cost import MACS, doubts, target_field
from prunesearch.errors import UserError
from prunesearch.evaluate.metrics import METRICS
from prunesearch.evaluate.shapes import model_shape
from prunesearch.files import save_profiles, with_profile
from prunesearch.presets import find_schedule
from prunesearch.profile import profile_problems
from prunesearch.schedule import Stage, spelled_out, verb_in
from prunesearch.search.sensitivity_start import WORD
from prunesearch.shape import ModelShape
from prunesearch.space.choices import NEVER, blocks_of, may_return
from prunesearch.space.problems import target_range_problems

logger = logging.getLogger(__name__)

FILE = "profile.json"
BATCH = 16
"""Images in a batch where the study does not say."""
TIMED = ("latency_ms", "throughput")


def with_known_profile(config: StudyConfig, url: str) -> StudyConfig:
    """The study with the profile of its file, or with that which was measured when the stored study began.

    A stored study has one profile for ever, so nothing is measured for it again.
    """
    config = with_profile(config)
    if config.device is None or config.device.table is not None:
        return config
    from prunesearch.study.reader import stored_config

    stored = stored_config(url, config.name)
    if stored is None or stored.device is None:
        return config
    return replace(config, device=replace(config.device, table=stored.device.table))


def with_measured_profile(config: StudyConfig, folder: Path, url: str) -> StudyConfig:
    """The study with a profile; one that has none is measured on this machine now, and written to its folder.

    If another driver has stored the study meanwhile, its profile is taken.

    Raises DeviceError, MissingLibraryError, ModelError and ResourceError.
    """
    device = config.device
    if device is None or device.table is not None:
        return config
    from prunesearch.device.profiles import measure_profiles

    shape = model_shape(config.model)
    verbs, scores = words_of(config, shape)
    (profile,) = measure_profiles(
        config.model,
        verbs=verbs,
        scores=scores,
        returning=verbs_that_return(config, shape),
        say=logger.warning,
        **measured_as(device),
    )
    stored = with_known_profile(config, url)
    if stored.device is not None and stored.device.table is not None:
        return stored
    for doubt in doubts(profile):
        logger.warning("device: %s", doubt)
    config = replace(config, device=replace(device, table=profile))
    save_profile(config, folder)
    return config


def save_profile(config: StudyConfig, folder: Path) -> None:
    """Write the profile of a study to its folder."""
    if config.device is not None and config.device.table is not None:
        save_profiles([config.device.table], folder / FILE)


def measured_as(device: DeviceConfig) -> dict[str, Any]:
    """The arguments of `measure_profiles` for a study's device. It has one batch size, as its profile has."""
    given = {name: getattr(device, name) for name in ("runtime", "threads", "precision")}
    given = {name: value for name, value in given.items() if value is not None}
    return {"batches": (device.batch or BATCH,), "seconds": device.seconds, **given}


def words_of(config: StudyConfig, shape: ModelShape) -> tuple[list[str], list[str]]:
    """The verbs and the scores that candidates of a study may have: those of its space and of its start schedules."""
    verbs: list[str] = []
    scores: list[str] = []
    for block in blocks_of(config.space):
        verbs += [verb_in(shape, verb) for verb in block.reduce]
        scores += block.score
    for stage in _start_stages(config, shape):
        verbs.append(stage.reduce)
        scores.append(stage.score)
    return list(dict.fromkeys(verbs)), [name for name in dict.fromkeys(scores) if name != "none"]


def verbs_that_return(config: StudyConfig, shape: ModelShape) -> list[str]:
    """The verbs whose tokens may come back in a study; `hold` is another one in a model without a feature map."""
    verbs = [
        verb_in(shape, verb)
        for block in blocks_of(config.space)
        for verb in block.reduce
        if verb_in(shape, verb) != verb or (may_return(verb) and any(word != NEVER for word in block.until))
    ]
    verbs += [stage.reduce for stage in _start_stages(config, shape) if stage.until is not None]
    return list(dict.fromkeys(verbs))


def _start_stages(config: StudyConfig, shape: ModelShape) -> list[Stage]:
    """The stages of the study's start schedules, with `hold` of a ViT written as what it does there."""
    starts = [find_schedule(name, shape) for name in config.space.start_from if name != WORD]
    return [stage for start in starts for stage in spelled_out(start, shape).stages]


def needing_profile(config: StudyConfig) -> list[str]:
    """The metrics of a study that are predicted by a profile."""
    budget = [] if config.budget is None else list(config.budget.written)
    names = dict.fromkeys((*config.metric_names, *budget))
    return [name for name in names if name in METRICS and METRICS[name].needs_profile]


def targets_needing_profile(config: StudyConfig, shape: ModelShape) -> list[str]:
    """Where a study has a target of thresholds that is predicted by a profile."""
    fields = {f"space.{field}": field for field in config.space.targets}
    for index, name in enumerate(config.space.start_from):
        try:
            target = None if name == WORD else find_schedule(name, shape).target
        except UserError:  # one that is not there is told elsewhere
            continue
        if target is not None:
            fields[f"space.start_from[{index}].{target.field}"] = target.field
    return [place for place, field in fields.items() if field != target_field(MACS)]


def without_predictions(config: StudyConfig) -> StudyConfig:
    """The study without limits and a budget that need a profile, for checks before there is one."""
    needing = needing_profile(config)
    limits = tuple((name, limit) for name, limit in config.limits if name not in needing)
    budget = config.budget
    if budget is not None and any(name in needing for name in budget.written):
        budget = None
    return replace(config, limits=limits, budget=budget)


def device_problems(config: StudyConfig, shape: ModelShape) -> list[str]:
    """Mistakes in the `device` section of a study. Its space must be without mistakes."""
    needing, device = needing_profile(config) + targets_needing_profile(config, shape), config.device
    if device is None:
        return [
            f"device: absent, but {', '.join(needing)} is predicted by a profile of a device. Possible: a file of "
            f"`prunesearch profile`, or measuring here. Write device: {{profile: FILE.json, batch: 16}} or "
            f"device: {{batch: 16}}."
        ] * bool(needing)
    if not needing:
        return [
            "device: no objective, limit, budget, metric or target is predicted by it. Possible: predicted_latency_ms. "
            "Name it in one of them, or leave device out."
        ]
    profile = device.table
    if profile is None:
        runtime, precision = device.runtime or "torch", device.precision or "float32"
        if precision == "float32" or runtime in IN_ANY_PRECISION:
            return []
        return [
            f"device.precision: {precision} is not measured in {runtime}. Possible: float32; others with "
            f"{' and '.join(IN_ANY_PRECISION)}. Change one of them."
        ]
    problems = [f"device.table: {problem}" for problem in profile_problems(profile)]
    if problems:
        return problems
    if profile.shape != shape:
        return [
            f"device.profile: it is of {profile.model}, {profile.shape.depth} blocks of width {profile.shape.dim} and "
            f"{profile.shape.patch_tokens} patch tokens, not of {config.model.name} as the study has it. Possible: a "
            f"profile of this model at this image size. Profile it: prunesearch profile STUDY.yaml."
        ]
    problems = target_range_problems(config.space, shape, profile)
    try:
        verbs, scores = words_of(config, shape)
    except UserError:  # a start schedule that is not there is told elsewhere
        return problems
    back = verbs_that_return(config, shape)
    for names, times, how in (
        (verbs, profile.verbs, ""),
        (scores, profile.scores, ""),
        (back, profile.returning, " with until"),
    ):
        known = [time.name for time in times]
        problems += [
            f"device.profile: {name} was not measured{how}. Possible{how}: {', '.join(known) or 'none'}. Profile the "
            f"study (prunesearch profile STUDY.yaml), or leave it out of the space and the start schedules."
            for name in names
            if name not in known
        ]
    return problems


def timing_notes(config: StudyConfig) -> list[str]:
    """What to know of the times in this study: doubts about its profile, and why speed that is measured for each
    candidate is noise, with what to write instead."""
    table = None if config.device is None else config.device.table
    notes = [] if table is None else [f"device: {doubt}" for doubt in doubts(table)]
    deciding = [name for name in config.deciding_metrics if name in TIMED]
    if not deciding or config.workers.kind == "serial" or config.workers.count == 1:
        return notes
    return [
        *notes,
        f"{', '.join(deciding)} is measured for each candidate, while several workers share a machine and slow each "
        f"other down: neighbours on the front may differ by noise alone. Write predicted_latency_ms and a device "
        f"section instead, which adds up what the parts of the model take. confirm times the front at the end, in "
        f"turns with the dense model.",
    ]
