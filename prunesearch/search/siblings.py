"""Dense siblings: smaller dense models, measured once as they come before the search. They are no part of it.

`once.py` makes the evaluations. Before the search a driver makes those that no living driver has claimed, and waits for
nobody. After the search it waits for those of the others. A driver that is killed leaves its claims: the others take
them over after their search, or at their next start.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

from prunesearch.config import Budget, DataConfig, ModelConfig, StudyConfig
from prunesearch.evaluate import METRICS
from prunesearch.evaluate.outcome import check_evaluation
from prunesearch.evaluate.siblings import find_siblings
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.record import Record, Sibling
from prunesearch.samplers.propose import seed_of
from prunesearch.schedule import Schedule
from prunesearch.search.once import Crew, make_each_once
from prunesearch.search.tasks import candidate_task
from prunesearch.strict import to_mapping
from prunesearch.study.store import Store
from prunesearch.workers.outbox import delete, delivered

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiblingMeasured:
    """Event: a dense sibling was evaluated. done, total: such evaluations, failed ones included."""

    sibling: Sibling
    evaluation: Evaluation
    done: int
    total: int


@dataclass(frozen=True)
class Wanted:
    """The evaluation of a sibling."""

    sibling: Sibling
    task: Task
    index: int = 0

    @property
    def of(self) -> str:
        """The uid of the sibling."""
        return self.sibling.uid


def take_up_siblings(config: StudyConfig, outboxes: Iterable[Path], store: Store, folder: Path) -> None:
    """At the start of a run: find the siblings, store which ones there are, and what earlier runs left in outboxes.

    What does not fit is a warning.
    """
    if config.siblings or store.siblings():
        found = find_siblings(config)
        for note in found.notes:
            logger.warning("%s", note)
        store.name_siblings(Sibling(uid_of(model, config), model) for model in found.models)
    for outbox in outboxes:
        _adopt(store, folder, outbox)


def unmeasured(store: Store) -> list[Sibling]:
    """The siblings of a study that have no evaluation yet."""
    return [sibling for sibling in store.siblings() if sibling.evaluation is None]


def measure_siblings(
    config: StudyConfig,
    crew: Crew,
    on_event: Callable[[SiblingMeasured], None] = lambda event: None,
    *,
    after: bool = False,
) -> None:
    """Evaluate each sibling once; skip what is already stored, and what another living driver has claimed.

    A sibling that fails is a warning; the next run tries it again.

    after: after the search. Then only what other drivers have claimed is waited for, or taken over from dead ones.
    """

    def look() -> tuple[list[Wanted], list[Wanted]]:
        every = [Wanted(sibling, sibling_task(sibling, config)) for sibling in crew.store.siblings()]
        missing = [one for one in every if one.sibling.evaluation is None]
        if after:
            claimed = {name for name, claim in crew.store.claims().items() if not claim.failed}
            missing = [one for one in missing if one.of in claimed]
        return every, missing

    def say(one: Wanted, evaluation: Evaluation, done: int, total: int) -> None:
        if evaluation.status == "failed":
            name, cause = one.sibling.name, evaluation.cause
            logger.warning("dense sibling %s: not measured (%s): %s", name, cause, evaluation.error)
        on_event(SiblingMeasured(one.sibling, evaluation, done, total))

    make_each_once(crew, look, partial(_adopt, crew.store, crew.folder), say, waits=after)


def sibling_task(sibling: Sibling, config: StudyConfig) -> Task:
    """The task that measures a sibling with its own weights, without any training."""
    seed = seed_of(config.sampler.seed, sibling.uid)
    record = Record(-1, sibling.uid, Schedule(), "running", "dense", seed)
    task = candidate_task(record, config, Budget(images=0))
    return replace(task, sibling=sibling.model, metrics=tuple(filter(_is_of_siblings, task.metrics)))


def _is_of_siblings(metric: str) -> bool:
    """A profile is of one model: what it predicts of another one would be wrong."""
    return metric not in METRICS or not METRICS[metric].needs_profile


def uid_of(model: ModelConfig, config: StudyConfig) -> str:
    """Identity of the evaluation of a sibling: 12 hexadecimal digits, a hash of all that its metrics depend on.

    What may change in a study does not count; see `study.differences`.
    """
    plain = DataConfig()
    changeable = ("root", "val_root", "test_root", "test_split", "loaders", "in_memory")
    data = replace(config.data, **{name: getattr(plain, name) for name in changeable})
    work = [to_mapping(one) for one in (model, config.model, data, config.measure)] + [config.finetune.amp]
    return blake2b(json.dumps(work, sort_keys=True).encode(), digest_size=6).hexdigest()


def _adopt(store: Store, folder: Path, outbox: Path) -> None:
    """Store the evaluations of siblings left in an outbox by an earlier process or a dead driver."""
    found = [entry for entry in delivered(outbox, store.alone, folder) if entry[1].sibling is not None]
    wanted = {sibling.uid for sibling in store.siblings()} if found else set()
    for path, task, evaluation in found:
        if task.uid not in wanted or evaluation.uid != task.uid:
            continue
        evaluation = check_evaluation(evaluation, filter(_is_of_siblings, store.config.deciding_metrics))
        if evaluation.status == "complete":
            store.confirm(task.uid, 0, evaluation)
        delete(path)
