"""Train the shared weights of `evaluation: supernet` on a worker before the search, in PARTS parts.

Each part is a task that saves its result. A dead worker, a kill or Ctrl-C loses at most one part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from prunesearch.config import Budget, StudyConfig
from prunesearch.errors import RunError, StudyError
from prunesearch.evaluate.limits import computed_limits
from prunesearch.evaluate.task import Evaluation, SupernetWork, Task
from prunesearch.samplers.propose import seed_of
from prunesearch.schedule import Schedule
from prunesearch.workers.outbox import discard
from prunesearch.workers.protocol import Lost, Workers

UID = "supernet"
PARTS = 10
TICK_SECONDS = 0.5


@dataclass(frozen=True)
class SupernetTrained:
    """Event: a part of the training is finished. images: so far, of `total`. seconds: of this part."""

    images: int
    total: int
    seconds: float


def shared_weights(evaluation: Literal["finetune", "supernet"], folder: Path) -> str | None:
    """Path of the shared weights (safetensors). None when candidates start from the weights of the model."""
    return f"{folder / 'weights' / UID}.safetensors" if evaluation == "supernet" else None


def prepare_supernet(
    config: StudyConfig,
    folder: Path,
    outbox: Path,
    workers: Workers,
    on_event: Callable[[SupernetTrained], None] = lambda event: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> str | None:
    """Train the shared weights if the study has some and they are not trained yet; returns `shared_weights`.

    folder: of the study, absolute. outbox: of the workers. is_stopped: polled while a worker trains; when it returns
    True, KeyboardInterrupt is raised. The next call continues after the last part that was saved. Raises RunError when
    the training fails.
    """
    if config.evaluation != "supernet":
        return None
    from prunesearch.evaluate.supernet import is_trained

    whole = supernet_task(config, folder)
    work, path = whole.supernet, shared_weights(config.evaluation, folder)
    assert work is not None and path is not None
    discard(outbox, UID, rung=0)  # left by a killed driver; the weights file decides what is done
    if is_trained(whole):
        return path
    done = 0
    while done < work.images:
        task = replace(whole, budget=Budget(images=_next_end(done, work.images, config.finetune.batch_size)))
        evaluation = _run(task, workers, config.workers.retries, is_stopped)
        discard(outbox, UID, rung=0)
        done = evaluation.images
        on_event(SupernetTrained(done, work.images, sum(seconds for _, seconds in evaluation.seconds)))
    if not is_trained(whole):
        raise RunError(
            f"supernet: the shared weights were trained, but {path} is not there. Possible: a study folder on a disk "
            f"that this machine and all workers share. Move the folder to one."
        )
    return path


def supernet_task(config: StudyConfig, folder: Path) -> Task:
    """The whole training as one task. Raises StudyError when the study has no section supernet."""
    if config.supernet is None:
        raise StudyError(
            f"study {config.name}: it has no section supernet. Possible: supernet: {{images: ...}}. Write it."
        )
    return Task(
        uid=UID,
        model=config.model,
        data=config.data,
        schedule=Schedule(),
        budget=Budget(images=config.supernet.images),
        finetune=config.finetune,
        measure=config.measure,
        seed=seed_of(config.sampler.seed, UID),
        device=config.workers.device,
        threads=max(1, int(config.workers.cpus_each)),
        save_to=str(folder / "weights" / UID),
        supernet=SupernetWork(
            config.space, config.supernet.schedules, config.supernet.images, tuple(computed_limits(config))
        ),
        plugins=config.plugins,
    )


def _next_end(done: int, images: int, batch_size: int) -> int:
    """The number of images at which the next part ends: about a PARTS-th of all, in whole batches."""
    part = math.ceil(images / PARTS / batch_size) * batch_size
    return min(done // part * part + part, images)


def _run(task: Task, workers: Workers, retries: int, is_stopped: Callable[[], bool]) -> Evaluation:
    for attempt in range(retries + 1):
        outcome = _wait(replace(task, attempt=attempt), workers, is_stopped)
        if not (isinstance(outcome, Lost) and outcome.cause == "crash"):
            break
    if isinstance(outcome, Lost) or outcome.status == "failed":
        trace = "" if isinstance(outcome, Lost) else outcome.traceback
        raise RunError(
            f"supernet: the shared weights could not be trained ({outcome.cause}): {outcome.error}. Possible: to go on "
            f"from the last tenth that was saved, when the cause is mended: with nan a lower finetune.learning_rate, "
            f"with oom a smaller finetune.batch_size. Run the study again.\n{trace}".rstrip()
        )
    return outcome


def _wait(task: Task, workers: Workers, is_stopped: Callable[[], bool]) -> Evaluation | Lost:
    if is_stopped():
        raise KeyboardInterrupt
    workers.submit(task)
    while True:
        for _, outcome in workers.wait(TICK_SECONDS):
            return outcome
        if is_stopped():
            raise KeyboardInterrupt
