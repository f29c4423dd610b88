"""Results of Ray Tune become candidates of a study. Reads the files that Tune writes, and needs no Ray."""

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
from prunesearch.strict import from_mapping
from prunesearch.study.opened import opened_study
from prunesearch.study.store import Store
from prunesearch.study.vocabulary import vocabulary_of

logger = logging.getLogger(__name__)

ENTRY = "prunesearch"
"""Name under which a trial reports task, evaluation and parameters, as JSON."""
CHECKPOINT = "candidate"
"""Name of the files in a checkpoint, without suffix."""


def import_results(results: Any, config: StudyConfig, folder: Path, *, storage: str | None = None) -> int:
    """Put the trials of Tune into a study, each with its evaluations and weights; returns how many.

    results: what `Tuner.fit` returned, or its folder. folder, storage: as in `run_study`; the study is made when it is
    not there, and can be continued. Left out are trials without an evaluation, and those of schedules that the study
    has; of trials with the same schedule the one that came furthest is taken. Raises StudyError when there are no such
    results, or they come from other settings.
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
    with opened_study(config, folder, storage) as (store, _):
        shape = model_shape(config.model)
        starts = start_schedules(config, shape)
        store.define(lambda: vocabulary_of(config.space, [schedule for _, schedule in starts]))
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
    """For each trial its evaluations, lowest rung first, and the folder of the trial."""
    for path in sorted(source.glob("*/result.json")):
        by_rung: dict[int, Entry] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(json.loads(line)[ENTRY])
            except (ValueError, KeyError):
                continue  # cut off by a kill, or turned down by arithmetic
            task = from_mapping(Task, entry["task"], str(path))
            evaluation = from_mapping(Evaluation, entry["evaluation"], str(path))
            by_rung[task.rung] = task, evaluation, entry["parameters"], path.parent
        if 0 in by_rung:
            yield [by_rung[rung] for rung in range(len(by_rung)) if rung in by_rung]


def _import(trial: list[Entry], origin: str, config: StudyConfig, folder: Path, store: Store) -> bool:
    """Whether the trial is a candidate of the study now."""
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
            return rung > 0  # another driver has it, or goes on with it
        checked = check_evaluation(replace(evaluation, checkpoint=weights), config.deciding_metrics)
        finished = store.finish(claimed, checked)
        if finished is None:
            return True  # another driver took it over
        record = finished
    return True


def _take_weights(evaluation: Evaluation, place: Path, folder: Path) -> str | None:
    """Copy the weights of an evaluation into the study; None when it has none, or Tune kept no checkpoint of it."""
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
