"""From a candidate of a study to the task that a worker gets."""

from __future__ import annotations

import logging
from pathlib import Path

from prunesearch.config import StudyConfig, as_options
from prunesearch.evaluate.task import Task
from prunesearch.record import Record
from prunesearch.search.shared_weights import shared_weights

logger = logging.getLogger(__name__)


def task_of(record: Record, attempt: int, config: StudyConfig, folder: Path) -> Task:
    """The evaluation of a record at its rung, continued from the checkpoint of the rung below."""
    budget, workers = config.rungs[record.rung], config.workers
    return Task(
        uid=record.uid,
        model=config.model,
        data=config.data,
        schedule=record.schedule,
        budget=budget,
        metrics=config.metric_names,
        finetune=config.finetune,
        measure=config.measure,
        rung=record.rung,
        attempt=attempt,
        seed=record.seed,
        device=workers.device,
        threads=max(1, int(workers.cpus_each)),
        resume_from=_checkpoint_below(record),
        save_to=None if budget.images == 0 else str(folder / "weights" / f"{record.uid}.{record.rung}"),
        start=shared_weights(config, folder),
        plugins=config.plugins,
        parameters=() if config.budget is None or record.parameters is None else as_options(record.parameters),
    )


def _checkpoint_below(record: Record) -> str | None:
    below = record.at(record.rung - 1)
    if below is None or below.checkpoint is None:
        return None
    if not Path(f"{below.checkpoint}.state").is_file():
        logger.warning("%s.state is gone: rung %d trains from the start", below.checkpoint, record.rung)
        return None
    return below.checkpoint
