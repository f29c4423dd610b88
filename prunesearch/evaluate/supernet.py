"""Weights that all schedules of a space share, trained once: the sandwich rule (Yu & Huang 2019, universally slimmable
networks, arXiv:1903.05134) with token schedules in the place of widths.

Each step takes one batch through the dense model, the cheapest schedule and a few random ones, and adds up their
gradients. Dense and cheapest are in every step because they bound what is in between.

All of them have the loss of an ordinary fine-tune, with the *original* dense model's logits as its soft target, where
universally slimmable networks take those that the widest network gives in the same step. They train from scratch and
have no better ones; here the original is a finished teacher, does not move while the weights do, and is what
`agreement` and the winners' own fine-tunes compare with.
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
import safetensors.torch
import torch
from torch import Tensor, nn

from prunesearch.evaluate.finetune import Batch, Progress, Teacher, distillation_loss, is_spent, take_steps
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.predict import autocast
from prunesearch.evaluate.sampling import cheapest_schedule, draw_schedule
from prunesearch.evaluate.task import SupernetWork, Task
from prunesearch.files import write_atomically
from prunesearch.models import apply_schedule, remove_schedule
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
    """Train `model` in place from where `progress` is to `task.budget`, with a learning rate on its way to
    `work.images`.

    What a step does depends on the seed and on how many images came before, so that trainings in the same parts give
    the same weights wherever they were interrupted. Raises LossNotFinite, or StudyError for a space without candidates.
    """
    if is_spent(task.budget, progress):
        return

    def losses(batch: Batch) -> Iterator[Tensor]:
        for schedule in schedules_of_step(task, work, progress.images):
            apply_schedule(model, schedule)
            with autocast(device, task.finetune.amp):
                logits = model(batch.images)
            yield distillation_loss(logits.float(), batch.labels, batch.target, task.finetune)

    def share() -> float:
        return progress.images / work.images

    take_steps(model, train, task.budget, task.finetune, teacher, device, task.seed, progress, losses, share)
    remove_schedule(model)


def schedules_of_step(task: Task, work: SupernetWork, images: int) -> list[Schedule]:
    """What the step that begins after so many images trains: the dense model, the cheapest schedule, random ones."""
    generator = random.Random(f"{task.seed}/{images}")
    drawn = [draw_schedule(work.space, work.limits, task.model, generator) for _ in range(work.schedules)]
    return [Schedule(), cheapest_schedule(work.space, work.limits, task.model), *drawn]


def made_with(task: Task) -> str:
    """16 hexadecimal digits of everything that decides what the shared weights become. Where images lie does not.

    Fields at their default are left out, so that a field that a later version adds does not change it.
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
    """Whether the shared weights of this task are there and finished; those of other settings are not."""
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
    """How far this training came in an earlier task, whose weights are put into `model`."""
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
    """Write `<save_to>.safetensors` when the training is over, else `<save_to>.state`: one file, so that weights and
    progress cannot come apart."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state = Path(f"{task.save_to}.state")
    if progress.images < work.images:
        buffer = io.BytesIO()
        torch.save({"weights": weights, "progress": vars(progress), "made_with": made_with(task)}, buffer)
        write_atomically(state, buffer.getvalue())
        return
    metadata = {"format": "pt", "made_with": made_with(task)}
    write_atomically(f"{task.save_to}.safetensors", safetensors.torch.save(weights, metadata=metadata))
    state.unlink(missing_ok=True)
