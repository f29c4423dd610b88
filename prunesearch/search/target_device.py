"""The `device` section of a study: its profile, what is wrong with it, and measuring it when a search starts."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.evaluate.metrics import METRICS
from prunesearch.files import save_profiles, with_profile
from prunesearch.profile import profile_problems
from prunesearch.shape import ModelShape
from prunesearch.space.choices import blocks_of
from prunesearch.study.reader import stored_config

logger = logging.getLogger(__name__)

FILE = "profile.json"
BATCH = 16
"""Images in a batch where the study does not say."""
TIMED = ("latency_ms", "throughput")


def with_known_profile(config: StudyConfig, url: str) -> StudyConfig:
    """The study with the profile of its file, or with that which was measured when the stored study began.

    A stored study has one profile for ever: with other settings it is refused before anything is measured.
    """
    config = with_profile(config)
    if config.device is None or config.device.table is not None:
        return config
    stored = stored_config(url, config.name)
    if stored is None or stored.device is None:
        return config
    return replace(config, device=replace(config.device, table=stored.device.table))


def with_measured_profile(config: StudyConfig, folder: Path) -> StudyConfig:
    """The study with a profile; one that has none is measured on this machine now, and written to its folder.

    Raises DeviceError, ModelError and ResourceError.
    """
    device = config.device
    if device is None or device.table is not None:
        return config
    from prunesearch.device.profiles import measure_profiles

    (profile,) = measure_profiles(
        config.model,
        space=config.space,
        batches=(device.batch or BATCH,),
        runtime=device.runtime or "torch",
        threads=device.threads,
        precision=device.precision or "float32",
        seconds=device.seconds,
        say=logger.warning,
    )
    save_profiles([profile], folder / FILE)
    return replace(config, device=replace(device, table=profile))


def needing_profile(config: StudyConfig) -> list[str]:
    """The metrics of a study that are predicted by a profile."""
    budget = [] if config.budget is None else list(config.budget.written)
    names = dict.fromkeys((*config.metric_names, *budget))
    return [name for name in names if name in METRICS and METRICS[name].needs_profile]


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
    needing, device = needing_profile(config), config.device
    if device is None:
        return [
            f"device: absent, but {', '.join(needing)} is predicted by a profile of a device. Possible: a file of "
            f"`prunesearch profile`, or measuring here. Write device: {{profile: FILE.json}} or device: {{batch: 16}}."
        ] * bool(needing)
    if not needing:
        return [
            "device: no objective, limit, budget or metric is predicted by it. Possible: predicted_latency_ms. Name it "
            "in one of them, or leave device out."
        ]
    profile = device.table
    if profile is None:
        return []
    problems = [f"device.table: {problem}" for problem in profile_problems(profile)]
    if problems:
        return problems
    if profile.shape != shape:
        return [
            f"device.profile: it is of {profile.model}, {profile.shape.depth} blocks of width {profile.shape.dim} and "
            f"{profile.shape.patch_tokens} patch tokens, not of {config.model.name} as the study has it. Possible: a "
            f"profile of this model at this image size. Profile it: prunesearch profile STUDY.yaml."
        ]
    verbs = {time.name for time in profile.verbs}
    scores = {time.name for time in profile.scores} | {"none"}
    missing = {
        **{name: "--verb" for block in blocks_of(config.space) for name in block.reduce if name not in verbs},
        **{name: "--score" for block in blocks_of(config.space) for name in block.score if name not in scores},
    }
    return [
        f"device.profile: {name} was not measured. Possible: {', '.join(sorted(verbs | scores))}. Profile again with "
        f"{flag} {name}, or leave it out of the space."
        for name, flag in missing.items()
    ]


def timing_notes(config: StudyConfig) -> list[str]:
    """Why speed that is measured for each candidate is noise in this study, and what to write instead."""
    deciding = [name for name in config.deciding_metrics if name in TIMED]
    if not deciding or config.workers.kind == "serial" or config.workers.count == 1:
        return []
    return [
        f"{', '.join(deciding)} is measured for each candidate, while several workers share a machine and slow each "
        f"other down: neighbours on the front may differ by noise alone. Write predicted_latency_ms and a device "
        f"section instead, which adds up what the parts of the model take. confirm measures the front alone at the end."
    ]
