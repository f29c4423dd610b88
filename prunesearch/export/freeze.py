"""Replace thresholds by fixed token counts, for tools that need static shapes (torch.compile, ONNX)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from prunesearch.config import DataConfig, ModelConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import build_model
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.machine import find_device
from prunesearch.evaluate.predict import predict
from prunesearch.evaluate.schedule_loss import cost_by_counts
from prunesearch.files import ScheduleFile, save_schedule, to_mapping, write_atomically
from prunesearch.models import PARTS, apply_schedule, shape_of, steps_of
from prunesearch.schedule import Schedule, Stage, Step
from prunesearch.tokens import REDUCERS


@dataclass(frozen=True)
class Frozen:
    """The schedule with fixed counts and its cost, the mean cost of the adaptive one, and the written files."""

    schedule: Schedule
    gmacs: float
    adaptive_gmacs: float
    files: tuple[Path, ...]


def freeze(
    file: ScheduleFile,
    folder: Path,
    target: Path,
    *,
    model: ModelConfig,
    data: DataConfig,
    images: int = 1024,
    batch_size: int = 128,
    device: str = "auto",
) -> Frozen:
    """Write a schedule file in which each threshold is the mean count that it gives on training images.

    Weights of the file (their path is relative to `folder`) are copied next to the target without the thresholds. The
    mean cost changes a little: attention is quadratic, so varying counts cost more than their mean. Raises
    ScheduleError for a schedule without thresholds.

    images: number of training images on which the counts are measured.
    """
    if not file.schedule.is_adaptive:
        raise ScheduleError("schedule", ["it has no threshold, so its counts are fixed. Use it as it is."])
    where = find_device(device)
    weights = None if file.weights is None else folder / file.weights
    adaptive = apply_schedule(build_model(model, where), file.schedule, weights=weights)
    train, _ = open_data(data, adaptive)
    counts = predict(adaptive, train, batch_size, where, amp=True, indices=torch.arange(min(images, len(train)))).counts
    shape, steps = shape_of(adaptive), steps_of(adaptive)
    mean_gmacs = cost_by_counts(counts, steps, shape, 1).mean().item() / 1e9
    schedule = Schedule(_fixed_stages(adaptive, counts))
    gmacs = estimate_cost(shape, schedule).gmacs
    written = [target]
    if weights is not None:
        written.append(target.with_suffix(".safetensors"))
        kept = {name: value.cpu() for name, value in adaptive.state_dict().items() if not _is_threshold(name)}
        write_atomically(written[1], safetensors.torch.save(kept, metadata={"format": "pt"}))
    save_schedule(
        schedule,
        target,
        model=to_mapping(model),
        data={"name": data.name, **to_mapping(data)},
        weights=written[1].name if len(written) > 1 else None,
        measured={"gmacs": gmacs},
        made_by={**(file.made_by or {}), "frozen_on": f"{len(counts[0])} training images"},
        plugins=file.plugins,
    )
    return Frozen(schedule, gmacs, mean_gmacs, tuple(written))


def _fixed_stages(model: nn.Module, counts: Sequence[Tensor]) -> tuple[Stage, ...]:
    """The stages with the mean counts, without those that then remove nothing."""
    steps, stages = steps_of(model), []
    means = [round(count.double().mean().item()) for count in counts]
    first = len(steps) - len(means)
    present = steps[first].step.before
    away: list[tuple[Step, int]] = []  # steps whose tokens come back, and how many there are then
    for index, planned in enumerate(steps):
        stage = planned.stage
        if index < first:
            stages.append(stage)
            if planned.step.until is not None:
                away.append((planned.step, planned.step.before))
            continue
        while away and away[-1][0].returns_by(stage.block):
            present = away.pop()[1]
        entry, after = REDUCERS[stage.reduce], means[index - first]
        kept = max(min(after - entry.extra_tokens, present), entry.fewest_kept(present))
        if kept < present:
            stages.append(replace(stage, keep=None, threshold=None, tokens=kept))
            if planned.step.until is not None:
                away.append((planned.step, present))
            present = kept + entry.extra_tokens
    return tuple(stages)


def _is_threshold(name: str) -> bool:
    return name.startswith(f"{PARTS}.") and name.endswith(".threshold")
