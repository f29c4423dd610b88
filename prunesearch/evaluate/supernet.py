"""Train shared weights once for all schedules of a space, by the sandwich rule with schedules instead of widths.

The sandwich rule is that of universally slimmable networks (Yu & Huang 2019, arXiv:1903.05134). Each step runs one
batch through the dense model, the cheapest schedule and a few random ones, and adds up their gradients. The dense model
and the cheapest schedule are in every step, because all other schedules lie between them.

The loss is that of an ordinary fine-tune. Its soft targets are the logits of the *original* dense model. Universally
slimmable networks use the widest network in the same step, because they train from scratch and have no better teacher.
Here the original model is already trained and does not change. `agreement` and later fine-tunes compare with it too.
"""

from __future__ import annotations

import io
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from prunesearch.evaluate.finetune import Batch, Progress, Teacher, distillation_loss, is_spent, take_steps
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.predict import autocast
from prunesearch.evaluate.sampling import cheapest_schedule, draw_schedule
from prunesearch.evaluate.task import SupernetWork, Task
from prunesearch.files import write_atomically
from prunesearch.models import apply_schedule, remove_schedule, shape_of
from prunesearch.models.weights import weights_of, write_weights
from prunesearch.schedule import Schedule
from prunesearch.strict import to_mapping

logger = logging.getLogger(__name__)


def train_supernet(
    model: nn.Module,
    train: ImageSet,
    task: Task,
    work: SupernetWork,
    teacher: Teacher | None,
    device: torch.device,
    progress: Progress,
) -> None:
    """Train `model` in place until `progress` has reached `task.budget`. The learning rate ends at `work.images`.

    A step depends only on the seed and on the number of images before it. So an interrupted training, continued in the
    same parts, gives the same weights. Raises LossNotFinite, or StudyError for a space without candidates.
    """
    if is_spent(task.budget, progress):
        return

    features = shape_of(model).gives_features

    def losses(batch: Batch) -> Iterator[Tensor]:
        for schedule in schedules_of_step(task, work, progress.images):
            apply_schedule(model, schedule)
            with autocast(device, task.finetune.amp):
                logits = model(batch.images)
            yield distillation_loss(logits.float(), batch.labels, batch.target, task.finetune, features)

    def share() -> float:
        return progress.images / work.images

    take_steps(model, train, task.budget, task.finetune, teacher, device, task.seed, progress, losses, share)
    remove_schedule(model)


def schedules_of_step(task: Task, work: SupernetWork, images: int) -> list[Schedule]:
    """The schedules of the step that begins after `images` images: dense, the cheapest, and random ones."""
    generator = random.Random(f"{task.seed}/{images}")
    drawn = [draw_schedule(work.space, work.limits, task.target, generator) for _ in range(work.schedules)]
    return [Schedule(), cheapest_schedule(work.space, work.limits, task.target), *drawn]


def made_with(task: Task) -> str:
    """Hash (16 hexadecimal digits) of all settings that change the shared weights. The location of images does not.

    Fields at their default are left out, so that fields that a later version adds do not change the hash.
    """
    assert task.supernet is not None
    data = replace(task.data, root=None, val_root=None, test_root=None, test_split=None, loaders=0, in_memory=True)
    parts = {
        "model": task.model,
        "data": data,
        "finetune": task.finetune,
        "supernet": replace(task.supernet, space=replace(task.supernet.space, start_from=())),
        "seed": task.seed,
    }
    text = json.dumps(to_mapping(parts), sort_keys=True)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def is_trained(task: Task) -> bool:
    """Whether finished shared weights of this task exist. Weights that were made with other settings do not count."""
    path = Path(f"{task.save_to}.safetensors")
    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("made_with")
    except safetensors.SafetensorError:
        found = None
    if found != made_with(task):
        logger.warning("%s was made with other settings: it will be replaced", path)
    return found == made_with(task)


def load_supernet(task: Task, work: SupernetWork, model: nn.Module) -> Progress:
    """Load the weights of an earlier task of this training into `model`, and return its progress.

    When the training is finished, no weights are loaded.
    """
    if is_trained(task):
        return Progress(images=work.images)
    path = Path(f"{task.save_to}.state")
    if not path.is_file():
        return Progress()
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["made_with"] != made_with(task):
        logger.warning("%s was made with other settings: training starts from the beginning", path)
        return Progress()
    model.load_state_dict(saved["weights"])
    return Progress(**saved["progress"])


def save_supernet(task: Task, work: SupernetWork, model: nn.Module, progress: Progress) -> None:
    """Write `<save_to>.safetensors` when the training is finished, otherwise `<save_to>.state`.

    The state is one file, so that weights and progress always belong together.
    """
    weights = weights_of(model)
    state = Path(f"{task.save_to}.state")
    if progress.images < work.images:
        buffer = io.BytesIO()
        torch.save({"weights": weights, "progress": vars(progress), "made_with": made_with(task)}, buffer)
        write_atomically(state, buffer.getvalue())
        return
    write_weights(f"{task.save_to}.safetensors", weights, made_with=made_with(task))
    state.unlink(missing_ok=True)
