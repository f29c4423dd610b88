"""Make the task for a worker from a candidate of a study."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from prunesearch.config import Budget, StudyConfig, as_options
from prunesearch.evaluate.task import Task
from prunesearch.record import Record
from prunesearch.search.shared_weights import shared_weights

logger = logging.getLogger(__name__)


def task_of(record: Record, attempt: int, config: StudyConfig, folder: Path) -> Task:
    """The task that evaluates a record at its rung, continuing from the checkpoint of the rung below."""
    budget = config.rungs[record.rung]
    return replace(
        candidate_task(record, config, budget),
        rung=record.rung,
        attempt=attempt,
        resume_from=_checkpoint_below(record),
        save_to=None if budget.images == 0 else str(folder / "weights" / f"{record.uid}.{record.rung}"),
        start=shared_weights(config.evaluation, folder),
        parameters=() if config.budget is None or record.parameters is None else as_options(record.parameters),
    )


def candidate_task(record: Record, config: StudyConfig, budget: Budget) -> Task:
    """A task for a record with any budget, starting from the weights of the model, without a checkpoint."""
    return Task(
        uid=record.uid,
        model=config.model,
        data=config.data,
        schedule=record.schedule,
        budget=budget,
        metrics=config.metric_names,
        finetune=config.finetune,
        measure=config.measure,
        seed=record.seed,
        device=config.workers.device,
        threads=max(1, int(config.workers.cpus_each)),
        plugins=config.plugins,
        profile=config.target.profile,
    )


def _checkpoint_below(record: Record) -> str | None:
    below = record.at(record.rung - 1)
    if below is None or below.checkpoint is None:
        return None
    if not Path(f"{below.checkpoint}.state").is_file():
        logger.warning("%s.state is gone: rung %d trains from the start", below.checkpoint, record.rung)
        return None
    return below.checkpoint
