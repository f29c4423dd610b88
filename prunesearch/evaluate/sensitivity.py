"""How much each stage of a space, alone in the dense model, changes what the model says: measured without training.

A few hundred training images go through the dense model once; each stage then runs the blocks from its own on, from
the tokens that arrived there. Validation images are not touched.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from prunesearch.config import DataConfig, ModelConfig, Range, SpaceConfig, StudyConfig
from prunesearch.errors import FileError, ScheduleError, StudyError
from prunesearch.evaluate.build import build_model, model_shape
from prunesearch.evaluate.data import open_training
from prunesearch.evaluate.machine import describe, find_device
from prunesearch.evaluate.predict import reproducible
from prunesearch.files import write_atomically
from prunesearch.models import apply_schedule, block_inputs, remove_schedule, run_from
from prunesearch.schedule import Place, Schedule, Stage, reads_attention, resolve
from prunesearch.shape import ModelShape
from prunesearch.space.choices import BlockChoices, blocks_of, grid_of
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.tokens import REDUCERS, SCORERS

logger = logging.getLogger(__name__)

IMAGES = 256
IMAGES_FOR_A_START = 64
"""Images for a table that only says where a search begins: a quarter of the time, and the starts are as good."""
CONTINUOUS = 8
"""Keep ratios that stand for a continuous range."""
DIGITS = 6
"""Significant digits of what is measured: what is beyond depends on the machine."""


@dataclass(frozen=True)
class Effect:
    """What one stage alone does. divergence: mean KL(dense || pruned) of the class probabilities, in nats.
    agreement: percent of the images that keep the dense model's class."""

    stage: Stage
    divergence: float
    agreement: float


@dataclass(frozen=True)
class Sensitivities:
    """The effects of all stages of a space, each alone, on one model and its training images.

    confidence: mean of the dense model's largest probability; near 1 most images say little in the divergence. seconds:
    of the measurement. left_out: scores, verbs and "thresholds" of the space that say nothing without training.
    """

    version: Literal[1]
    model: ModelConfig
    data: DataConfig
    images: int
    confidence: float
    effects: tuple[Effect, ...]
    seconds: float
    device: str
    left_out: tuple[str, ...] = ()

    def fits(self, config: StudyConfig) -> bool:
        """Whether it was measured on the model and data of a study, and holds every stage of its space."""
        wanted, _ = stages_of(config.space, model_shape(config.model))
        known = {effect.stage for effect in self.effects}
        same = self.model == config.model and _training(self.data) == _training(config.data)
        return same and known.issuperset(wanted)


def stages_of(space: SpaceConfig, shape: ModelShape) -> tuple[list[Stage], tuple[str, ...]]:
    """Every stage of a space that can stand alone and means something without training, by block; and the names of the
    scores and verbs that were left out because they learn, with "thresholds" when there are any.

    Of a continuous range there are CONTINUOUS ratios.
    """
    stages: list[Stage] = []
    left_out: set[str] = set()
    for block in sorted(blocks_of(space), key=lambda block: block.block):
        if "threshold" in block.amount:
            left_out.add("thresholds")
        if "keep" not in block.amount:
            continue
        for verb, at in itertools.product(block.reduce, block.at):
            scores = block.score if REDUCERS[verb].ranks else ("none",)
            for score in scores:
                learns = [name for name in (verb, score) if _learns(name)]
                left_out.update(learns)
                if not learns:
                    stage = Stage(block.block, at=cast(Place, at), score=score, keep=1.0, reduce=verb)
                    stages += [replace(stage, keep=keep) for keep in _keeps(block)]
    return [stage for stage in stages if _is_possible(stage, shape)], tuple(sorted(left_out))


def most_stages(space: SpaceConfig) -> int:
    """How many stages `stages_of` looks at, without looking."""
    return sum(
        len(block.reduce) * len(block.at) * len(block.score) * len(_keeps(block))
        for block in blocks_of(space)
        if "keep" in block.amount
    )


def measure_sensitivities(config: StudyConfig, count: int = IMAGES) -> Sensitivities:
    """Measure every stage of a study's space on `count` training images (all when there are fewer), on the device of
    its workers but in this process.

    The images are part of those that the study trains on, always the same. Plugins must have been imported. Raises
    StudyError when nothing can be measured without training; ModelError, DataError and ResourceError as an evaluation.
    """
    stages, left_out = stages_of(config.space, model_shape(config.model))
    if not stages:
        raise StudyError(nothing_to_measure(left_out))
    device = find_device(config.workers.device)
    begin = time.perf_counter()
    few = replace(config.data, train_images=min(count, config.data.train_images or count))
    with torch.random.fork_rng(devices=[]):  # a first model and first images take some
        model = build_model(config.model, device)
        images = open_training(few, model)
    starts = [_start(stage) for stage in stages]
    divergence, same = (torch.zeros(len(stages), dtype=torch.float64) for _ in range(2))
    confidence, seen = 0.0, 0
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_device), reproducible(device), torch.inference_mode():
        for batch, labels in images.batches(torch.arange(len(images)).split(config.measure.batch_size), device):
            if len(labels) == 0:  # none of them could be read
                continue
            seen += len(labels)
            logits, inputs = block_inputs(model, batch, set(starts))
            dense_BC = _log_probabilities(logits)
            confidence += dense_BC.exp().amax(dim=1).sum().item()
            for index, (stage, first) in enumerate(zip(stages, starts, strict=True)):
                apply_schedule(model, Schedule((stage,)))
                torch.manual_seed(0)  # a random score must not depend on what ran before
                pruned_BC = _log_probabilities(run_from(model, inputs[first], first))
                divergence[index] += (dense_BC.exp() * (dense_BC - pruned_BC)).sum()
                same[index] += (dense_BC.argmax(dim=1) == pruned_BC.argmax(dim=1)).sum()
            remove_schedule(model)
    effects = [
        Effect(stage, _short(max(total / seen, 0.0)), _short(100 * equal / seen))
        for stage, total, equal in zip(stages, divergence.tolist(), same.tolist(), strict=True)
    ]
    seconds = round(time.perf_counter() - begin, 3)
    found = Sensitivities(
        version=1,
        model=config.model,
        data=config.data,
        images=seen,
        confidence=_short(confidence / seen),
        effects=tuple(effects),
        seconds=seconds,
        device=describe(device),
        left_out=left_out,
    )
    logger.info("%d stages measured alone on %d images in %.1f s", len(stages), seen, seconds)
    return found


def nothing_to_measure(left_out: Collection[str]) -> str:
    """What to say of a space without any stage that could be measured."""
    what = f"{', '.join(left_out)} mean nothing without training" if left_out else "no stage can stand alone in it"
    return (
        f"sensitivity: {what}, so that this space has nothing to measure. Possible: keep ratios below 1 with scores "
        f"and verbs that do not learn. Add some, or take sensitivity out of space.start_from."
    )


def save_sensitivities(found: Sensitivities, path: Path) -> None:
    """Write a JSON file, atomically."""
    write_atomically(path, (json.dumps(to_mapping(found), indent=1) + "\n").encode())


def load_sensitivities(path: Path) -> Sensitivities:
    """Read what `save_sensitivities` wrote. Raises FileError with all mistakes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = f"cannot be read as JSON: {error}. Possible: what prunesearch sensitivity -o wrote. Measure again."
        raise FileError(str(path), [problem]) from None
    return from_mapping(Sensitivities, content, str(path))


def _learns(name: str) -> bool:
    entries = [registry[name] for registry in (SCORERS, REDUCERS) if name in registry]
    return any(entry.part is not None for entry in entries)


def _keeps(block: BlockChoices) -> list[float]:
    keep = block.keep
    if not isinstance(keep, Range):
        values = list(keep)
    elif keep.step is not None:
        values = list(grid_of(keep))
    else:
        share = (keep.high - keep.low) / (CONTINUOUS - 1)
        inner = [round(keep.low + index * share, 4) for index in range(1, CONTINUOUS - 1)]
        values = [keep.low, *(value for value in inner if keep.low < value < keep.high), keep.high]
    return sorted({value for value in values if value < 1.0})


def _is_possible(stage: Stage, shape: ModelShape) -> bool:
    try:
        resolve(Schedule((stage,)), shape)
    except ScheduleError:
        return False
    return True


def _start(stage: Stage) -> int:
    """The block that a stage has to be run from: it may read the attention of the one before."""
    return stage.block - (stage.at == "pre" and reads_attention(stage))


def _training(data: DataConfig) -> DataConfig:
    """The part of a data section that says which images are trained on, and how they are read."""
    other = {"val_root": None, "val_split": "", "test_root": None, "test_split": None, "val_images": None}
    return replace(data, **other, train_images=None, in_memory=True, loaders=0)  # type: ignore[arg-type]


def _log_probabilities(logits_BC: Tensor) -> Tensor:
    """In double precision on the CPU: a confident model's smallest probabilities are beyond single precision."""
    return logits_BC.cpu().double().log_softmax(dim=1)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value
