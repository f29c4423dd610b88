"""Measure the effect of each stage of a space alone, in the dense model and without training.

A few hundred training images go through the dense model once. For each stage, only the blocks from its own on are run
again, from the tokens that arrived there. Validation images are not used.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from prunesearch.config import StudyConfig
from prunesearch.errors import StudyError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.data import open_training
from prunesearch.evaluate.machine import describe, find_device
from prunesearch.evaluate.predict import reproducible
from prunesearch.evaluate.sensitivity import IMAGES, Effect, Sensitivities, nothing_to_measure, stages_of
from prunesearch.evaluate.shapes import model_shape
from prunesearch.models import apply_schedule, block_inputs, remove_schedule, run_from
from prunesearch.schedule import Schedule, Stage, canonical, reads_attention

logger = logging.getLogger(__name__)

DIGITS = 6
"""Significant digits of results. Further digits would depend on the machine."""


def measure_sensitivities(config: StudyConfig, count: int = IMAGES) -> Sensitivities:
    """Measure every stage of a study's space, in this process, on the device that the study gives its workers.

    count: number of training images (all when there are fewer); always the same ones. Plug-ins must have been imported.
    Raises StudyError when nothing can be measured without training; ModelError, DataError and ResourceError as in an
    evaluation.
    """
    shape = model_shape(config.model)
    possible, left_out = stages_of(config.space, shape)
    if not possible:
        raise StudyError(nothing_to_measure(left_out))
    # stages that do the same alone, such as those until the next stage and until the end, are measured once
    same_as = {stage: canonical(Schedule((stage,)), shape) for stage in possible}
    stages = list({form: stage for stage, form in reversed(same_as.items())}.values())[::-1]
    device = find_device(config.workers.device)
    begin = time.perf_counter()
    few = replace(config.data, train_images=min(count, config.data.train_images or count))
    with torch.random.fork_rng(devices=[]):  # loading draws random numbers
        model = build_model(config.model, device)
        images = open_training(few, model)
    starts, features = [_start(stage) for stage in stages], shape.gives_features
    compare = _compared_features if features else _compared_classes
    divergence, same = (torch.zeros(len(stages), dtype=torch.float64) for _ in range(2))
    confidence, seen = 0.0, 0
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_device), reproducible(device), torch.inference_mode():
        for batch, labels in images.batches(torch.arange(len(images)).split(config.measure.batch_size), device):
            if len(labels) == 0:  # none of them could be read
                continue
            seen += len(labels)
            logits, inputs = block_inputs(model, batch, set(starts))
            dense_BC = logits.cpu().double()
            confidence += 1.0 * len(labels) if features else _of_image(dense_BC.softmax(dim=1).amax(dim=1)).sum().item()
            for index, (stage, first) in enumerate(zip(stages, starts, strict=True)):
                apply_schedule(model, Schedule((stage,)))
                torch.manual_seed(0)  # a random score must not depend on what ran before
                far_B, alike_B = compare(dense_BC, run_from(model, inputs[first], first).cpu().double())
                divergence[index] += far_B.sum()
                same[index] += alike_B.sum()
            remove_schedule(model)
    measured = {
        same_as[stage]: (_short(max(total / seen, 0.0)), _short(100 * equal / seen))
        for stage, total, equal in zip(stages, divergence.tolist(), same.tolist(), strict=True)
    }
    effects = [Effect(stage, *measured[form]) for stage, form in same_as.items()]
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
        of_features=features,
    )
    logger.info("%d stages measured alone on %d images in %.1f s", len(stages), seen, seconds)
    return found


def _start(stage: Stage) -> int:
    """The block from which a stage must be run: its own, or the one before when it reads that block's attention."""
    return stage.block - (stage.at == "pre" and reads_attention(stage))


def _compared_classes(dense_BC: Tensor, pruned_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of each image in nats, and 1 where the class is the same; for patches the mean of both over them.

    Logits are float64, as float32 cannot hold the smallest probabilities of a confident model.
    """
    dense_BC, pruned_BC = dense_BC.log_softmax(dim=1), pruned_BC.log_softmax(dim=1)
    same_B = dense_BC.argmax(dim=1) == pruned_BC.argmax(dim=1)
    return _of_image((dense_BC.exp() * (dense_BC - pruned_BC)).sum(dim=1)), _of_image(same_B.double())


def _of_image(values: Tensor) -> Tensor:
    """A value for each image, (B): the mean over its patches, if there is one for each."""
    return values if values.ndim == 1 else values.flatten(1).mean(dim=1)


def _compared_features(dense_BC: Tensor, pruned_BC: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine of each image's features, and the cosine."""
    cosine_B = F.cosine_similarity(dense_BC, pruned_BC, dim=1)
    return 1 - cosine_B, cosine_B


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value
