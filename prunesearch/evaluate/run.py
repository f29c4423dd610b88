"""`evaluate(Task) -> Evaluation`: build the model, apply the schedule, fine-tune within the budget, measure."""

from __future__ import annotations

import errno
import logging
import math
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from prunesearch.config import DataConfig, ModelConfig, Target
from prunesearch.cost import estimate_cost, target_of
from prunesearch.errors import ModelError, PruneSearchError, ScheduleError, UserError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.calibrate import calibrate
from prunesearch.evaluate.data import Split, open_data, open_split, unreadable_note
from prunesearch.evaluate.finetune import (
    DenseOutput,
    LossNotFinite,
    Progress,
    Teacher,
    finetune,
    is_spent,
    load_checkpoint,
    save_checkpoint,
)
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.machine import describe, find_device, versions
from prunesearch.evaluate.measures import Subject
from prunesearch.evaluate.metrics import METRICS, Measured, misread
from prunesearch.evaluate.predict import autocast, predict, reproducible
from prunesearch.evaluate.schedule_loss import distills_patches, distills_tokens
from prunesearch.evaluate.shapes import model_shape
from prunesearch.evaluate.supernet import load_supernet, save_supernet, train_supernet
from prunesearch.evaluate.task import Cause, Evaluation, Speed, SupernetWork, Task
from prunesearch.models import apply_schedule, learned_parts, patches_of, schedule_of
from prunesearch.plugins import import_plugins
from prunesearch.schedule import Schedule

logger = logging.getLogger(__name__)


class MetricNotFinite(Exception):
    """A metric is NaN or infinite."""


@dataclass
class Findings:
    """What is known of an evaluation so far. A failed Evaluation reports it too."""

    metrics: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    tokens: tuple[int, ...] = ()
    device: str = ""
    checkpoint: str | None = None
    schedule: Schedule | None = None
    data: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    train: ImageSet | None = None
    speeds: tuple[Speed, ...] = ()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def evaluate(task: Task, *, raise_user_errors: bool = False) -> Evaluation:
    """Evaluate a schedule, or train shared weights; see `carried_out`.

    The process keeps weights, decoded images and the dense model's logits for the next task.
    """
    return carried_out(task, _run, raise_user_errors=raise_user_errors)


def carried_out(task: Task, work: Callable[[Task, Findings], None], *, raise_user_errors: bool = False) -> Evaluation:
    """Run one task by a function that notes what it finds. Errors are not raised: they are returned as a failed
    Evaluation.

    raise_user_errors: raise UserErrors, for callers that show them to the user.
    """
    found = Findings()
    cause: Cause | None = None
    error = trace = ""
    try:
        work(task, found)
    except Exception as problem:
        if raise_user_errors and isinstance(problem, UserError):
            raise
        cause, error = _cause(problem), _in_words(problem)
        trace = "" if isinstance(problem, UserError) else traceback.format_exc()  # its words say all
        logger.warning("%s failed (%s): %s", task.uid, cause, error)
        problem.__traceback__ = None  # it holds the tensors of the failed run
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Evaluation(
        uid=task.uid,
        status="complete" if cause is None else "failed",
        rung=task.rung,
        attempt=task.attempt,
        cause=cause,
        error=error,
        traceback=trace,
        metrics=tuple(found.metrics.items()),
        spread=tuple(found.spread.items()),
        tokens=found.tokens,
        images=found.progress.images,
        seconds=tuple(found.seconds.items()),
        versions=versions() + found.data,
        host=socket.gethostname(),
        device=found.device,
        checkpoint=found.checkpoint,
        start=task.start,
        schedule=found.schedule,
        data_notes=_data_notes(found),
        speeds=found.speeds,
    )


def _data_notes(found: Findings) -> tuple[str, ...]:
    """Messages about images that were left out: when they were opened, and while this task decoded them."""
    if found.train is None or not found.train.unreadable:
        return found.notes
    bad = list(found.train.unreadable.values())
    return (*found.notes, unreadable_note("train", bad, len(found.train)))


def _run(task: Task, found: Findings) -> None:
    import_plugins(task.plugins)
    calibrates = task.finetune.calibration_images > 0 and task.weights is None
    # thresholds that stay where they are need no profile, although they were trained by one
    stays = task.budget.images == 0 and not calibrates
    is_known = task.profile is not None or task.schedule.target_predicted_latency_ms is None
    target = None if stays and not is_known else target_of(task.schedule, task.profile)
    wanted = task.metrics if target is None else (*task.metrics, "target_miss")
    metrics = [METRICS[name] for name in dict.fromkeys(wanted)]
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    device = find_device(task.device)
    found.device = describe(device)
    if task.supernet is not None:
        _train_shared(task, task.supernet, device, found)
        return
    amp, batch_size, measured = task.finetune.amp, task.measure.batch_size, task.sibling or task.model
    with found.phase("load"):
        for metric in metrics:
            problem = misread(metric.name, model_shape(measured))
            if problem is not None:
                raise ModelError(f"metric {problem}")
        found.tokens = estimate_cost(model_shape(measured), task.schedule).tokens
        model = build_model(measured, device, task.start)
        if task.sibling is None:
            train, held_out = open_data(task.data, model, task.split)
        else:  # it is not trained, and decoding the training images as it wants them may take long
            train = held_out = open_split(task.data, model, task.split)
        found.train, found.notes = train, tuple(dict.fromkeys(train.notes + held_out.notes))
        train.unreadable.clear()  # those of earlier tasks
        if train.in_memory:
            found.data = (("data", f"{train.fingerprint} {held_out.fingerprint}"),)
        apply_schedule(model, task.schedule, weights=task.weights, seed=task.seed, untrained=True)
        if task.resume_from is not None:
            found.progress = load_checkpoint(task.resume_from, model)
        elif learned_parts(model) and task.budget.images == 0 and task.weights is None:
            logger.warning("%s: measured without training, with a fresh %s", task.uid, learned_parts(model)[0])
    before = found.progress.images
    if task.budget.images != 0:
        with found.phase("load"):
            gives_tokens = distills_tokens(model, task.finetune) or distills_patches(model, task.finetune)
            teacher = _teacher(task, train, device, gives_tokens)
        _seed(task.seed)
        with found.phase("train"), reproducible(device):
            finetune(model, train, task.budget, task.finetune, teacher, device, task.seed, found.progress, task.profile)
    if target is not None and calibrates:
        with found.phase("calibrate"):
            calibrate(model, train, task.finetune.calibration_images, batch_size, device, amp, task.profile)
    if task.schedule.is_adaptive:
        found.schedule = schedule_of(model)
    if task.budget.images != 0:
        with found.phase("train"):
            if task.save_to is not None and found.progress.images > before:
                save_checkpoint(task.save_to, model, found.progress)
                found.checkpoint = task.save_to
    dense = partial(dense_logits, task.model, task.data, task.split, device, amp, batch_size)
    subject = Subject(
        model,
        Target(measured, None if task.sibling else task.profile),
        task.schedule,
        held_out,
        task.measure,
        device,
        amp,
        dense,
        task.model,
        train,
    )
    with found.phase("measure"):
        for metric in metrics:
            _seed(task.seed)  # a random score must not depend on what ran before
            value = metric.measure(subject)
            if isinstance(value, Measured):
                value, found.spread[metric.name] = value
            if not math.isfinite(value):
                raise MetricNotFinite(f"metric {metric.name} is {value}")
            found.metrics[metric.name] = float(value)
        if task.schedule.is_adaptive:
            found.tokens = subject.tokens


def _train_shared(task: Task, work: SupernetWork, device: torch.device, found: Findings) -> None:
    with found.phase("load"):
        model = build_model(task.model, device)
        train, _ = open_data(task.data, model)
        train.unreadable.clear()
        found.progress = load_supernet(task, work, model)
        found.checkpoint = task.save_to
        if is_spent(task.budget, found.progress):
            return
        teacher = _teacher(task, train, device, gives_tokens=False)
    _seed(task.seed + found.progress.images)
    with found.phase("train"), reproducible(device):
        train_supernet(model, train, task, work, teacher, device, found.progress)
        save_supernet(task, work, model, found.progress)


@lru_cache(maxsize=6)
def dense_logits(
    model: ModelConfig,
    data: DataConfig,
    split: Split,
    device: torch.device,
    amp: bool,
    batch_size: int,
    flip: bool = False,
) -> Tensor:
    """Logits of the original dense model for all images of a split, computed once and kept on the CPU."""
    dense = build_model(model, device)
    images = open_data(data, dense)[0] if split == "train" else open_data(data, dense, split)[1]
    return predict(dense, images, batch_size, device, amp, flip).logits


def _teacher(task: Task, train: ImageSet, device: torch.device, gives_tokens: bool) -> Teacher | None:
    """The dense model as a teacher for distillation; None without distillation.

    With images in memory, the logits of the whole set are computed once per worker (and once mirrored, when training
    mirrors). With images that are decoded each time, or when the loss needs final tokens (`gives_tokens`) or logits of
    patches, the dense model runs on each batch: the set may be far larger than the budget, and tokens far larger than
    logits.
    """
    amp, batch_size = task.finetune.amp, task.measure.batch_size
    if not task.finetune.distill:
        return None
    if train.in_memory and not gives_tokens and not model_shape(task.model).segments:
        of_split = partial(dense_logits, task.model, task.data, "train", device, amp, batch_size)
        upright = of_split(flip=False)
        mirrored = of_split(flip=True) if task.finetune.augment == "flip" else upright

        def look_up(images: Tensor, indices: Tensor, mirror: Tensor) -> DenseOutput:
            return DenseOutput(torch.where(mirror[:, None], mirrored[indices], upright[indices]))

        return look_up
    dense: Any = build_model(task.model, device)

    @torch.no_grad()
    def forward(images: Tensor, indices: Tensor, mirror: Tensor) -> DenseOutput:
        with autocast(device, amp):
            features = dense.forward_features(images)
            return DenseOutput(dense.forward_head(features).float(), patches_of(dense, features))

    return forward


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _in_words(problem: Exception) -> str:
    """The message of an exception. One that is no message to the user also gets its type and where it was raised."""
    said = str(problem) or type(problem).__name__
    if isinstance(problem, PruneSearchError):
        return said
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [frame for frame in frames if not {"torch", "timm"} & set(Path(frame.filename).parts)] or frames
    return f"{said} ({type(problem).__name__} at {ours[-1].filename}:{ours[-1].lineno})"


def _cause(problem: Exception) -> Cause:
    if isinstance(problem, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(problem):
        return "oom"
    if isinstance(problem, (LossNotFinite, MetricNotFinite)):
        return "nan"
    if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(problem):
        return "disk"
    return "invalid" if isinstance(problem, ScheduleError) else "error"
