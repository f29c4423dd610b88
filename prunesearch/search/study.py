"""The record: a study in Optuna's storage, one trial for each candidate. The only file that writes there.

A trial of prunesearch carries, besides what Optuna knows (parameters, values, state, constraints, times):

    uid        identity of the canonical schedule     origin    dense, "start: NAME" or sampler
    schedule   as in a schedule file                  seed      of its task
    owner      host:pid of the driver that runs it    attempts  for each rung, how often it was begun
    rung:0     the Evaluation of rung 0, ..., and in  error     why it failed: oom, crash, timeout, nan, ...
               `order` how many came before it

RUNNING becomes COMPLETE with the evaluation of the last rung, whose values Optuna shows, and FAIL when one fails. With
an evaluation of a lower rung it becomes WAITING, that is for a promotion, and RUNNING again when that comes: as long as
a study can be continued with more candidates, it is open who goes on. So COMPLETE ones all had the same budget.
`create_new_trial` and `set_trial_state_values` are storage methods that Optuna does not promise to keep, hence the pin
`optuna < 6`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from prunesearch.config import StudyConfig
from prunesearch.errors import RunError, StudyError
from prunesearch.evaluate.task import Evaluation
from prunesearch.schedule import Schedule
from prunesearch.search.differences import refuse_other_settings
from prunesearch.search.limits import excess
from prunesearch.search.record import Record, State, with_evaluation
from prunesearch.search.samplers import parameters_and_distributions, quiet_optuna
from prunesearch.space import parameters_of
from prunesearch.strict import from_mapping, to_mapping

BUSY_SECONDS = 60
"""How long SQLite waits for another process to finish writing."""

_STATES: dict[TrialState, State] = {
    TrialState.WAITING: "paused",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "complete",
}


def storage_url(folder: Path) -> str:
    """The SQLite file of a study folder."""
    return f"sqlite:///{(folder / 'study.db').absolute()}"


class StudyReader:
    """A study that is only looked at; works while a search writes to it."""

    def __init__(self, storage: BaseStorage, study_id: int, config: StudyConfig) -> None:
        self._storage, self._study_id, self.config = storage, study_id, config

    def records(self) -> list[Record]:
        """Every candidate so far, in the order of their numbers."""
        with _storage_errors():
            trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        return [_record(trial) for trial in sorted(trials, key=lambda trial: trial.number)]

    def close(self) -> None:
        """Give back connections."""
        _close(self._storage)


class Store(StudyReader):
    """A study that a driver writes to."""

    def __init__(self, storage: BaseStorage, study_id: int, config: StudyConfig) -> None:
        super().__init__(storage, study_id, config)
        trials = storage.get_all_trials(study_id, deepcopy=False)
        self._trial_ids = {trial.number: trial._trial_id for trial in trials}
        self._attempts: dict[int, list[int]] = {trial.number: trial.user_attrs["attempts"] for trial in trials}
        self._last_rung = len(config.rungs) - 1
        self.results = sum(len(_rung_keys(trial)) for trial in trials)
        """Evaluations in the study so far."""

    def begin(self, record: Record, excess: Mapping[str, float]) -> Record:
        """Record a new running candidate, in one commit; the result has its number. `excess` is what arithmetic
        knows of the limits."""
        parameters = parameters_of(record.schedule, self.config.space)
        params, distributions = parameters_and_distributions(self.config.space, parameters)
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=distributions,
            user_attrs={
                "uid": record.uid,
                "schedule": to_mapping(record.schedule),
                "origin": record.origin,
                "seed": record.seed,
                "owner": f"{socket.gethostname()}:{os.getpid()}",
                "attempts": [1],
            },
            constraints=dict(excess),
        )
        with _storage_errors():
            trial_id = self._storage.create_new_trial(self._study_id, template_trial=trial)
            number = self._storage.get_trial_number_from_id(trial_id)
        self._trial_ids[number], self._attempts[number] = trial_id, [1]
        return replace(record, number=number)

    def begin_again(self, number: int) -> int:
        """Count another attempt at its rung, by this process. Returns how many there were before."""
        *earlier, before = self._attempts[number]
        self._begin_at(number, [*earlier, before + 1])
        return before

    def promote(self, record: Record) -> None:
        """Record that a paused candidate runs again, at `record.rung`. The state comes last, as in `finish`."""
        self._begin_at(record.number, [*self._attempts[record.number][: record.rung], 1])
        with _storage_errors():
            self._storage.set_trial_state_values(self._trial_ids[record.number], TrialState.RUNNING)

    def _begin_at(self, number: int, attempts: list[int]) -> None:
        self._attempts[number] = attempts
        with _storage_errors():
            self._storage.set_trial_user_attr(self._trial_ids[number], "attempts", attempts)
            owner = f"{socket.gethostname()}:{os.getpid()}"
            self._storage.set_trial_user_attr(self._trial_ids[number], "owner", owner)

    def finish(self, record: Record, evaluation: Evaluation) -> Record:
        """Record what came back, and pause or close the candidate. The state comes last: whoever sees it closed sees
        it whole.

        Doing it twice with the same evaluation is harmless as long as the first time was cut short.
        """
        trial_id = self._trial_ids[record.number]
        values = dict(evaluation.metrics)
        record = with_evaluation(record, evaluation, self.results, self._last_rung)
        self.results = max(self.results, record.orders[-1] + 1)
        with _storage_errors():
            about = {"order": record.orders[-1], **to_mapping(evaluation)}
            self._storage.set_trial_user_attr(trial_id, f"rung:{evaluation.rung}", about)
            if record.state == "paused":
                self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
                return record
            known = self._storage.get_trial_system_attrs(trial_id)
            for name, amount in excess(self.config, values).items():
                key = f"constraints:{name}"
                if key not in known:  # those that arithmetic knows are there from the start
                    self._storage.set_trial_system_attr(trial_id, key, amount)
            if record.state == "complete":
                objectives = [values[objective.metric] for objective in self.config.objectives]
                self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, objectives)
            else:
                self._storage.set_trial_user_attr(trial_id, "error", evaluation.cause)
                self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
        return record


def open_store(config: StudyConfig, url: str) -> Store:
    """Create the study, or continue it. Raises StudyError when it exists with other settings, with the differences."""
    storage = _open_storage(url, writing=True)
    directions = [optuna.study.StudyDirection[f"{objective.goal}".upper()] for objective in config.objectives]
    with quiet_optuna(), _storage_errors():
        try:
            study_id = storage.create_new_study(directions, config.name)
        except optuna.exceptions.DuplicatedStudyError:
            study_id = storage.get_study_id_from_name(config.name)
        attributes = storage.get_study_user_attrs(study_id)
        if "config" in attributes:
            refuse_other_settings(config, attributes["config"])
        elif storage.get_n_trials(study_id) > 0:
            raise StudyError(
                f"study {config.name!r} in {_shown(url)}: it has trials but was not made by prunesearch. "
                f"Possible: a new name. Change name in the study file."
            )
        else:
            _describe(storage, study_id, config)
        if attributes.get("config") != to_mapping(config):
            storage.set_study_user_attr(study_id, "config", to_mapping(config))  # last: it says that all is there
    return Store(storage, study_id, config)


def open_study_readonly(
    folder: Path | None = None, *, storage: str | None = None, name: str | None = None
) -> StudyReader:
    """Open a study to look at it: by its folder, or by storage URL and study name (the only one there when absent).

    Raises StudyError when there is none.
    """
    if storage is None:
        if folder is None:
            raise StudyError("no study given. Possible: a study folder, or a storage URL. Name one of them.")
        storage = storage_url(folder)
    backend = _open_storage(storage, writing=False)
    with quiet_optuna(), _storage_errors():
        studies = {study.study_name: study for study in backend.get_all_studies() if "config" in study.user_attrs}
    if name is None and len(studies) == 1:
        name = next(iter(studies))
    if name not in studies:
        what = f"has no study {name!r}" if name is not None else f"has {len(studies)} studies"
        known = ", ".join(sorted(studies)) or "none"
        _close(backend)
        raise StudyError(f"{_shown(storage)}: {what}. Possible: {known}. Give one of them as the study's name.")
    study = studies[name]
    config = from_mapping(StudyConfig, study.user_attrs["config"], f"study {name}")
    return StudyReader(backend, study._study_id, config)


def _describe(storage: BaseStorage, study_id: int, config: StudyConfig) -> None:
    storage.set_study_system_attr(study_id, "study:metric_names", [objective.metric for objective in config.objectives])
    try:
        version = metadata.version("prunesearch")
    except metadata.PackageNotFoundError:
        version = "not installed"
    storage.set_study_user_attr(study_id, "prunesearch", version)
    storage.set_study_user_attr(study_id, "sampler", config.sampler.name)
    for part in ("space", "objectives"):
        text = json.dumps(to_mapping(getattr(config, part), defaults=True), sort_keys=True)
        storage.set_study_user_attr(study_id, f"{part}_hash", blake2b(text.encode(), digest_size=8).hexdigest())


def _record(trial: FrozenTrial) -> Record:
    about = trial.user_attrs
    place = f"trial {trial.number}"
    results = [dict(about[key]) for key in _rung_keys(trial)]
    orders = tuple(result.pop("order") for result in results)
    evaluations = tuple(from_mapping(Evaluation, result, place) for result in results)
    runs = trial.state == TrialState.RUNNING or not evaluations
    return Record(
        number=trial.number,
        uid=about["uid"],
        schedule=from_mapping(Schedule, about["schedule"], place),
        state=_STATES[trial.state],
        origin=about["origin"],
        seed=about["seed"],
        evaluations=evaluations,
        orders=orders,
        rung=len(about["attempts"]) - 1 if runs else evaluations[-1].rung,
    )


def _rung_keys(trial: FrozenTrial) -> list[str]:
    """Names of the attributes that hold its evaluations, lowest rung first."""
    names = (name for name in trial.user_attrs if name.startswith("rung:"))
    return sorted(names, key=lambda name: int(name.removeprefix("rung:")))


# --- storages ----------------------------------------------------------------------------------------------------


def _open_storage(url: str, *, writing: bool) -> BaseStorage:
    if url == "memory:":  # for searches that are replayed: nothing stays
        return optuna.storages.InMemoryStorage()
    if url.startswith("journal:"):
        path = Path(url.removeprefix("journal:"))
        if not writing and not path.exists():
            raise StudyError(f"{url}: there is no such file. Possible: the storage of a study that was run. Check it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path))
        return JournalStorage(backend)
    try:
        parsed = make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite and parsed.database:
            if not writing and not Path(parsed.database).exists():
                raise StudyError(
                    f"{parsed.database}: there is no such file. Possible: the folder of a study that was run, or "
                    f"--storage URL. Check the path, or run the study first."
                )
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        options = {"connect_args": {"timeout": BUSY_SECONDS}} if is_sqlite else {}
        rdb = RDBStorage(url, engine_kwargs=options, skip_table_creation=not writing)
        if is_sqlite:
            _careful_sqlite(rdb.engine, writing=writing)
    except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        raise StudyError(
            f"storage {_shown(url)} cannot be opened: {_first_line(error)}. Possible: sqlite:///FILE, "
            f"postgresql://USER:PASSWORD@HOST/DATABASE, mysql://..., journal:FILE. Check the URL and its driver."
        ) from error
    return optuna.storages.get_storage(rdb)


def _careful_sqlite(engine: Engine, *, writing: bool) -> None:
    """Every connection: survive power loss, let others read, wait for others who write.

    A transaction of a writer takes the write lock before it reads. With SQLite's own way, two processes that read
    and then write both fail, or both take the same trial.
    """
    engine.dispose()

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # no hidden BEGIN
        if writing:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA busy_timeout={1000 * BUSY_SECONDS}")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _close(storage: BaseStorage) -> None:
    storage.remove_session()
    backend = getattr(storage, "_backend", None)  # of Optuna's cache around a database
    if isinstance(backend, RDBStorage):
        backend.engine.dispose()


@contextmanager
def _storage_errors() -> Iterator[None]:
    """A storage that went away is a failed run, not a traceback of its library."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        raise RunError(
            f"storage: {_first_line(error.__cause__ or error)}. What was written stays; finished evaluations are in "
            f"the outbox. Mend the storage and run the study again to continue."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shown(url: str) -> str:
    """The URL without its password."""
    if url.startswith("journal:"):
        return url
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "the given URL"
