"""Import results of Ray Tune into a study. Reads the files that Tune wrote; Ray is not started."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunesearch.config import StudyConfig
from prunesearch.errors import StudyError
from prunesearch.evaluate import model_shape
from prunesearch.evaluate.outcome import check_evaluation, same_work
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.plugins import import_plugins
from prunesearch.record import Record
from prunesearch.search.problems import start_schedules
from prunesearch.search.recovery import begin
from prunesearch.search.tasks import task_of
from prunesearch.space.choices import Value, uid_of
from prunesearch.space.vocabulary import vocabulary_of
from prunesearch.strict import from_mapping
from prunesearch.study.opened import opened_study, url_and_drivers
from prunesearch.study.store import Store

logger = logging.getLogger(__name__)

ENTRY = "prunesearch"
"""Name of the metric in which a trial reports task, evaluation and parameters as JSON."""
CHECKPOINT = "candidate"
"""Name of the files in a checkpoint, without suffix."""


def import_results(results: Any, config: StudyConfig, folder: Path, *, storage: str | None = None) -> int:
    """Store trials of Tune as candidates of a study, with their evaluations and weights; returns how many.

    Trials without an evaluation and schedules that the study already has are left out. Of several trials with the same
    schedule the one with the most rungs is taken. Evaluations made with other settings are left out with a warning.
    Raises StudyError when no trial has results of prunesearch, or the study exists with other settings.

    results: the return value of `Tuner.fit`, or the folder of the experiment. folder, storage: as in `run_study`; the
    study is created if it does not exist, and can be continued.
    """
    import_plugins(config.plugins)
    source = results if isinstance(results, Path) else Path(results.experiment_path)
    trials = list(_trials(source))
    if not trials:
        raise StudyError(
            f"{source}: no trial in it has results of prunesearch. Possible: the folder of an experiment of "
            f"`prunesearch.tune.trainable` on a disk of this machine (RunConfig's storage_path/name). Name it."
        )
    folder = folder.absolute()
    with opened_study(config, folder, *url_and_drivers(folder, storage)) as (store, _):
        shape = model_shape(config.model)
        starts = start_schedules(config, shape)
        store.define(lambda: vocabulary_of(config.space, [schedule for _, schedule in starts], shape))
        origins = {uid_of(schedule, shape): origin for origin, schedule in reversed(starts)}
        known = {record.uid for record in store.records()}
        furthest: dict[str, list[Entry]] = {}
        for trial in trials:
            uid = trial[0][0].uid
            furthest[uid] = max(furthest.get(uid, []), trial, key=len)
        return sum(
            _import(trial, origins.get(uid, "sampler"), config, folder, store)
            for uid, trial in furthest.items()
            if uid not in known
        )


Entry = tuple[Task, Evaluation, dict[str, Value], Path]


def _trials(source: Path) -> Iterator[list[Entry]]:
    """For each trial its entries, lowest rung first: task, evaluation, parameters and folder of the trial."""
    for path in sorted(source.glob("*/result.json")):
        by_rung: dict[int, Entry] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(json.loads(line)[ENTRY])
            except (ValueError, KeyError):
                continue  # truncated by a kill, or a trial that was never evaluated
            task = from_mapping(Task, entry["task"], str(path))
            evaluation = from_mapping(Evaluation, entry["evaluation"], str(path))
            by_rung[task.rung] = task, evaluation, entry["parameters"], path.parent
        if 0 in by_rung:
            yield [by_rung[rung] for rung in range(len(by_rung)) if rung in by_rung]


def _import(trial: list[Entry], origin: str, config: StudyConfig, folder: Path, store: Store) -> bool:
    """Store a trial as a candidate, rung by rung. False when none of its rungs could be stored."""
    task, _, parameters, _ = trial[0]
    record = Record(-1, task.uid, task.schedule, "running", origin, task.seed, parameters=parameters)
    for rung, (task, evaluation, _, place) in enumerate(trial):
        begun = replace(record, state="running", rung=rung)
        if task.rung != rung or rung >= len(config.rungs) or not same_work(task, task_of(begun, 0, config, folder)):
            logger.warning("%s: rung %d of %s was evaluated with other settings", place, task.rung, task.uid)
            return rung > 0
        weights = _take_weights(evaluation, place, folder)
        if weights is None and evaluation.checkpoint is not None and rung == len(trial) - 1:
            logger.warning("%s: Tune kept no checkpoint of rung %d, so its weights are gone", place, rung)
        claimed = begin(store, begun)
        if claimed is None:
            return rung > 0  # another driver has or continues the same candidate
        checked = check_evaluation(replace(evaluation, checkpoint=weights), config.deciding_metrics)
        finished = store.finish(claimed, checked)
        if finished is None:
            return True  # another driver took it over
        record = finished
    return True


def _take_weights(evaluation: Evaluation, place: Path, folder: Path) -> str | None:
    """Copy the weights of an evaluation to the study; returns their path without suffix.

    None when it has no weights or Tune kept no checkpoint of it.
    """
    if evaluation.checkpoint is None:
        return None
    for path in place.glob(f"checkpoint_*/{CHECKPOINT}.json"):
        done = [from_mapping(Evaluation, entry, str(path)) for entry in json.loads(path.read_text(encoding="utf-8"))]
        if done and done[-1].rung == evaluation.rung:
            target = folder / "weights" / f"{evaluation.uid}.{evaluation.rung}"
            target.parent.mkdir(exist_ok=True)
            for suffix in (".safetensors", ".state"):
                if (source := path.with_suffix(suffix)).is_file():
                    copy = Path(f"{target}{suffix}.partial")
                    shutil.copyfile(source, copy)
                    os.replace(copy, f"{target}{suffix}")
            return str(target)
    return None
