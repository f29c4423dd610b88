"""Read a study without writing to it: the trials of Optuna's storage as records."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from prunesearch.config import ModelConfig, StudyConfig
from prunesearch.errors import FileError, RunError, StudyError
from prunesearch.evaluate.outcome import check_evaluation
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import SPEED, Record, Sibling, State
from prunesearch.schedule import Schedule
from prunesearch.space.vocabulary import Vocabulary
from prunesearch.strict import from_mapping
from prunesearch.study import rows
from prunesearch.study.distributions import quiet_optuna
from prunesearch.study.storage import (
    close_storage,
    database_of,
    file_of,
    open_storage,
    shown,
    storage_errors,
    storage_url,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
_STATES: dict[TrialState, State] = {
    TrialState.WAITING: "paused",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "complete",
}


_DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Exceptions that reading damaged data may raise."""


@dataclass(frozen=True)
class Beat:
    """A sign of life of a driver.

    count: a new number with each beat; None: the driver has ended normally. machine: id of its machine. place: the file
    that it keeps locked.
    """

    count: int | None
    machine: str
    place: str


@dataclass(frozen=True)
class Claim:
    """A claim to confirm a candidate. owner: the driver. failed: it tried, and the evaluation failed."""

    owner: str
    failed: bool = False


class StudyReader:
    """Read-only view of a study. It may be used while a search writes to the study."""

    def __init__(self, storage: BaseStorage, study_id: int, config: StudyConfig) -> None:
        self._storage, self._study_id, self.config = storage, study_id, config
        self.file: Path | None = None
        """The file of the storage; None for a server or memory."""
        self.has_begun = False
        """Whether its start schedules are stored."""
        self.vocabulary = Vocabulary()
        """Facts of its scores and verbs; empty for a study begun by an earlier version."""
        self.unreadable: dict[int, str] = {}
        """Trials that could not be read by the last `records`: number -> reason."""

    def records(self) -> list[Record]:
        """All candidates so far that can be read, by number. The others are in `unreadable`."""
        with storage_errors(self.file):
            trials, unreadable = read_trials(self._storage, self._study_id)
            attributes = self._storage.get_study_user_attrs(self._study_id)
        records: dict[str, Record] = {}
        for trial in candidates_of(trials, first_number(attributes)):
            record = read_record(trial, self.config)
            if isinstance(record, str):
                unreadable[trial.number] = record
            else:
                records.setdefault(record.uid, record)
        self._leave_out(unreadable)
        return measured_beside(records.values(), attributes)

    def siblings(self) -> list[Sibling]:
        """The dense siblings of the study, in its order; those without an evaluation are not measured yet."""
        with storage_errors(self.file):
            return siblings_of(self._storage.get_study_user_attrs(self._study_id))

    def _leave_out(self, unreadable: dict[int, str]) -> None:
        """Log once for each trial that it cannot be read."""
        for number, why in sorted(unreadable.items()):
            if number not in self.unreadable:
                logger.warning("trial %d: %s; it is left out", number, why)
        self.unreadable = unreadable

    def close(self) -> None:
        """Close the connections."""
        close_storage(self._storage)


def has_study(url: str, name: str) -> bool:
    """Whether a storage has a study whose start schedules are stored."""
    try:
        reader = open_study_readonly(storage=url, name=name)
    except (StudyError, RunError):
        return False
    reader.close()
    return reader.has_begun


def stored_config(url: str, name: str) -> StudyConfig | None:
    """The settings of a study in a storage; None when it is not there, or cannot be read."""
    try:
        reader = open_study_readonly(storage=url, name=name)
    except (StudyError, RunError):
        return None
    reader.close()
    return reader.config


def knows_study(url: str, name: str) -> bool:
    """Whether a storage holds a study; False also when there is no such database or table.

    Raises StudyError or RunError when the storage cannot be read.
    """
    try:
        open_study_readonly(storage=url, name=name).close()
    except (StudyError, RunError) as error:
        if error.__cause__ is None:
            return False
        cause: BaseException | None = error
        while cause is not None:
            if "no such table" in str(cause) or "does not exist" in str(cause):
                return False
            cause = cause.__cause__
        raise
    return True


def open_study_readonly(
    folder: Path | None = None, *, storage: str | None = None, name: str | None = None
) -> StudyReader:
    """Open a study for reading, by its folder or by storage URL and name.

    name may be left out when the storage has one study. Raises StudyError when there is no such study.
    """
    if storage is None:
        if folder is None:
            raise StudyError("no study given. Possible: a study folder, or a storage URL. Name one of them.")
        storage = storage_url(folder)
    backend, file = open_storage(storage, writing=False), file_of(storage)
    with quiet_optuna(), storage_errors(file):
        studies = {study.study_name: study for study in backend.get_all_studies() if "config" in study.user_attrs}
    if name is None and len(studies) == 1:
        name = next(iter(studies))
    if name not in studies:
        what = f"has no study {name!r}" if name is not None else f"has {len(studies)} studies"
        known = ", ".join(sorted(studies)) or "none"
        close_storage(backend)
        raise StudyError(f"{shown(storage)}: {what}. Possible: {known}. Give one of them as the study's name.")
    study = studies[name]
    config = from_mapping(StudyConfig, study.user_attrs["config"], f"study {name}")
    reader = StudyReader(backend, study._study_id, config)
    reader.file, reader.has_begun = file, study.user_attrs.get("starts") is not None
    reader.vocabulary = from_mapping(Vocabulary, study.user_attrs.get("vocabulary", {}), f"study {name}")
    return reader


@dataclass(frozen=True)
class _About:
    """The user attributes of a trial that describe its candidate, without the evaluations."""

    uid: str
    schedule: Schedule
    origin: str
    seed: int
    attempts: tuple[int, ...]
    owner: str = ""


def read_trials(storage: BaseStorage, study_id: int) -> tuple[list[FrozenTrial], dict[int, str]]:
    """The trials of a study that Optuna can read, and number -> reason for those that it cannot."""
    try:
        return storage.get_all_trials(study_id, deepcopy=False), {}
    except _DAMAGED:
        database = database_of(storage)
        if database is None:
            raise
        with database.engine.begin() as connection:
            found = rows.trial_numbers(connection, study_id)
        if not found:  # something other than a trial is damaged
            raise
    trials, unreadable = [], {}
    for trial_id, number in found:
        try:
            trials.append(database.get_trial(trial_id))
        except _DAMAGED as error:
            unreadable[number] = f"Optuna cannot read it ({type(error).__name__}: {error})"
    return trials, unreadable


def read_record(trial: FrozenTrial, config: StudyConfig) -> Record | str:
    """The candidate of a trial, or the reason why it cannot be read."""
    try:
        return _record(trial, config)
    except FileError as error:
        return f"{error.place}: {'; '.join(error.problems)}"
    except _DAMAGED as error:
        return f"{type(error).__name__}: {error}"


def _record(trial: FrozenTrial, config: StudyConfig) -> Record:
    attributes = trial.user_attrs
    if "uid" not in attributes:
        raise FileError("attributes", ["it was not written by prunesearch"])
    names = [field.name for field in fields(_About)]
    about = from_mapping(_About, {name: attributes[name] for name in names if name in attributes}, "attributes")
    evaluations, orders = [], []
    for key in rung_keys(trial):
        order, evaluation = _evaluation(attributes[key], key)
        orders.append(order)
        evaluations.append(evaluation)
        problem = _evaluation_problem(evaluation, about.schedule, config.deciding_metrics, len(config.rungs))
        if problem is None and key != f"rung:{evaluation.rung}":
            problem = f"it is of rung {evaluation.rung}"
        if problem is not None:
            raise FileError(key, [problem])
    state = _STATES[trial.state]
    if not evaluations and state != "running":
        raise FileError("attributes", [f"it is {state} without an evaluation"])
    rung = len(about.attempts) - 1 if state == "running" else evaluations[-1].rung
    if not 0 <= rung < len(config.rungs):
        raise FileError("attempts", [f"{len(about.attempts)} rungs; the study has {len(config.rungs)}"])
    return Record(
        number=trial.number,
        uid=about.uid,
        schedule=about.schedule,
        state=state,
        origin=about.origin,
        seed=about.seed,
        evaluations=tuple(evaluations),
        orders=tuple(orders),
        rung=rung,
        parameters=dict(trial.params) or None,
        owner=about.owner,
    )


def _evaluation(value: Any, place: str) -> tuple[int, Evaluation]:
    """(order, evaluation) of a stored result. order: how many evaluations the study had before it."""
    said = dict(value) if isinstance(value, Mapping) else {}
    order = said.pop("order", None)
    if type(order) is not int:
        raise FileError(place, [f"order is {order!r}; possible: a whole number"])
    return order, from_mapping(Evaluation, said, place)


def _evaluation_problem(evaluation: Evaluation, schedule: Schedule, needed: Sequence[str], rungs: int) -> str | None:
    """Why an evaluation cannot belong to this study; None if it can."""
    verdict = check_evaluation(evaluation, needed)
    if verdict.status != evaluation.status:
        return verdict.error
    if evaluation.rung not in range(rungs):
        return f"rung {evaluation.rung}; the study has {rungs}"
    last = max((stage.block for stage in (evaluation.schedule or schedule).stages), default=-1)
    if evaluation.tokens and last >= len(evaluation.tokens):
        return f"a stage at block {last} of a model with {len(evaluation.tokens)} blocks"
    return None


def as_said(kind: type[T], value: Any, place: str) -> T | None:
    """Read what a driver stored as an attribute of the study; None (with a warning) when it cannot be read."""
    try:
        return from_mapping(kind, value, place)
    except FileError as error:
        logger.warning("%s; it is left out", error)
        return None


def candidates_of(trials: list[FrozenTrial], first: int) -> list[FrozenTrial]:
    """The trials that are candidates, by number: from number `first` on, without void ones."""
    found = [trial for trial in trials if trial.number >= first and "void" not in trial.user_attrs]
    return sorted(found, key=lambda trial: trial.number)


def first_number(attributes: Mapping[str, Any]) -> int:
    """The number of the first trial that counts as a candidate; see `open_store`."""
    first = attributes.get("first", 0)
    return first if type(first) is int else 0


def confirmations_of(attributes: Mapping[str, Any], uid: str) -> tuple[Evaluation, ...]:
    """The confirmations of a candidate that can be read, by index."""
    prefix, found = f"confirm:{uid}:", {}
    for name, value in attributes.items():
        index = name.removeprefix(prefix)
        if name.startswith(prefix) and index.isdecimal():
            try:
                found[int(index)] = from_mapping(Evaluation, value, name)
            except FileError as error:
                logger.warning("%s; it is left out", error)
    return tuple(found[index] for index in sorted(found))


def measured_beside(records: Iterable[Record], attributes: Mapping[str, Any]) -> list[Record]:
    """The records with what was measured of them beside the search: confirmations and speeds."""
    speeds = {speed.name: speed for one in confirmations_of(attributes, SPEED)[:1] for speed in one.speeds}
    return [
        replace(
            record,
            confirmations=confirmations_of(attributes, record.uid),
            speed=speeds.get(record.uid if record.schedule.stages else ""),
        )
        for record in records
    ]


def siblings_of(attributes: Mapping[str, Any]) -> list[Sibling]:
    """The dense siblings that can be read, each with its evaluation, which is stored as a confirmation of its uid."""
    said = attributes.get("siblings")
    found = []
    for uid, model in said.items() if isinstance(said, Mapping) else ():
        sibling = as_said(ModelConfig, model, f"sibling {uid}")
        if sibling is not None:
            found.append(Sibling(uid, sibling, next(iter(confirmations_of(attributes, uid)), None)))
    return found


def rung_keys(trial: FrozenTrial) -> list[str]:
    """Names of the attributes that hold the evaluations of a trial, lowest rung first."""
    rungs = [name.removeprefix("rung:") for name in trial.user_attrs if name.startswith("rung:")]
    return [f"rung:{rung}" for rung in sorted((rung for rung in rungs if rung.isdecimal()), key=int)]
