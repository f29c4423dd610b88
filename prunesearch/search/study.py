"""The record: a study in Optuna's storage, one trial for each candidate. The only file that writes there.

A trial of prunesearch carries, besides what Optuna knows (parameters, values, state, constraints, times):

    uid        identity of the canonical schedule     origin    dense, "start: NAME" or sampler
    schedule   as in a schedule file                  seed      of its task
    owner      the driver that runs it, or did last   attempts  for each rung, how often it was begun
    rung:0     the Evaluation of rung 0, ..., and in  error     why it failed: oom, crash, timeout, nan, ...
               `order` how many came before it        void      why it is no candidate

RUNNING becomes COMPLETE with the evaluation of the last rung, whose values Optuna shows, and FAIL when one fails. With
an evaluation of a lower rung it becomes WAITING, that is for a promotion, and RUNNING again when that comes: as long as
a study can be continued with more candidates, it is open who goes on. So COMPLETE ones all had the same budget.
`create_new_trial` and `set_trial_state_values` are storage methods that Optuna does not promise to keep, hence the pin
`optuna < 6`.

Several drivers may write to one database. Whoever created the first trial with a uid has it; the trial of one who came
later is void. Whoever turns WAITING into RUNNING promotes. Whoever changes the owner of a candidate that runs takes it
over. The database makes each of these happen for one driver only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from prunesearch.config import StudyConfig
from prunesearch.errors import FileError, RunError, StudyError
from prunesearch.evaluate.task import Evaluation
from prunesearch.schedule import Schedule
from prunesearch.search.differences import refuse_other_settings
from prunesearch.search.limits import excess
from prunesearch.search.record import Record, State, with_evaluation
from prunesearch.search.samplers import parameters_and_distributions, quiet_optuna
from prunesearch.search.storage import (
    Patience,
    close_storage,
    database_of,
    file_of,
    open_storage,
    shown,
    storage_errors,
    storage_url,
)
from prunesearch.search.verdict import judged
from prunesearch.search.vocabulary import Vocabulary, refuse_other_defaults
from prunesearch.space import parameters_of
from prunesearch.strict import from_mapping, to_mapping

logger = logging.getLogger(__name__)

_STATES: dict[TrialState, State] = {
    TrialState.WAITING: "paused",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "complete",
}
_TRIALS = sql.table("trials", sql.column("trial_id"), sql.column("study_id"), sql.column("number"))
_DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading stored data raises that is not as it was written."""
_ATTRIBUTES = sql.table("trial_user_attributes", sql.column("trial_id"), sql.column("key"), sql.column("value_json"))


@dataclass(frozen=True)
class Beat:
    """A sign of life of a driver: a number that it never said before, None when it ended by itself; the machine it is
    on, and the file that it holds locked."""

    count: int | None
    machine: str
    place: str


class StudyReader:
    """A study that is only looked at; works while a search writes to it."""

    def __init__(self, storage: BaseStorage, study_id: int, config: StudyConfig) -> None:
        self._storage, self._study_id, self.config = storage, study_id, config
        self.file: Path | None = None
        """Where it is stored, when that is a file."""
        self.has_begun = False
        """Whether its start schedules are known."""
        self.vocabulary = Vocabulary()
        """What its scores and verbs mean; empty for a study that an earlier version began."""
        self.unreadable: dict[int, str] = {}
        """Trials that are left out because they cannot be read, and why, as of the last reading."""

    def records(self) -> list[Record]:
        """Every candidate so far that can be read, in the order of their numbers; see `unreadable`."""
        with storage_errors(self.file):
            trials, unreadable = read_trials(self._storage, self._study_id)
            attributes = self._storage.get_study_user_attrs(self._study_id)
        records: dict[str, Record] = {}
        for trial in _candidates(trials, _first_number(attributes)):
            record = read_record(trial, self.config)
            if isinstance(record, str):
                unreadable[trial.number] = record
            else:
                records.setdefault(record.uid, replace(record, confirmations=_confirmations(attributes, record.uid)))
        self._leave_out(unreadable)
        return list(records.values())

    def _leave_out(self, unreadable: dict[int, str]) -> None:
        """Say once which trials cannot be read."""
        for number, why in sorted(unreadable.items()):
            if number not in self.unreadable:
                logger.warning("trial %d: %s; it is left out", number, why)
        self.unreadable = unreadable

    def close(self) -> None:
        """Give back connections."""
        close_storage(self._storage)


class Store(StudyReader):
    """A study that a driver writes to.

    owner: the name of the driver. alone: no other driver writes, so that nothing need be claimed. patience: calls the
    storage, and waits when it is away.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        config: StudyConfig,
        owner: str = "",
        alone: bool = True,
        patience: Patience | None = None,
    ) -> None:
        super().__init__(storage, study_id, config)
        self.owner, self.alone, self._ask = owner, alone, patience or Patience()
        self._last_rung = len(config.rungs) - 1
        self._first = _first_number(self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)))
        self._trial_ids: dict[int, int] = {}
        self._attempts: dict[int, list[int]] = {}
        self._seen: dict[str, tuple[object, Record]] = {}
        self.results = 0
        """Evaluations in the study so far."""
        self.voided: list[str] = []
        """What the last `changed` found to be no candidate after all, though an earlier one had seen it run."""
        self.changed()

    def records(self) -> list[Record]:
        """As of a reader; only what changed is read again."""
        self.changed()
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        known = sorted((record for _, record in self._seen.values()), key=lambda record: record.number)
        return [replace(record, confirmations=_confirmations(attributes, record.uid)) for record in known]

    def changed(self) -> list[Record]:
        """Candidates that are new or other than when the study was last read, in the order of their numbers."""
        trials, unreadable = self._ask(lambda: read_trials(self._storage, self._study_id))
        void = {trial.number for trial in trials if "void" in trial.user_attrs}
        self.voided = [record.uid for _, record in self._seen.values() if record.number in void]
        for uid in self.voided:
            del self._seen[uid]
        found = []
        for trial in _candidates(trials, self._first):
            uid, marks = str(trial.user_attrs.get("uid")), _marks(trial)
            before = self._seen.get(uid)
            if before is not None and (before[0] == marks or before[1].number < trial.number):
                continue
            record = read_record(trial, self.config)
            if isinstance(record, str):
                unreadable[trial.number] = record
                continue
            record = self._with_fitting_parameters(record)
            self.results += len(record.evaluations) - (0 if before is None else len(before[1].evaluations))
            self._seen[uid] = marks, record
            self._trial_ids[trial.number] = trial._trial_id
            self._attempts[trial.number] = list(trial.user_attrs["attempts"])
            found.append(record)
        self._leave_out(unreadable)
        return found

    def _with_fitting_parameters(self, record: Record) -> Record:
        """Without parameters that are not of the space: the schedule says them too."""
        _, distributions = parameters_and_distributions(self.config.space, record.parameters)
        try:
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=dict(record.parameters or {}), distributions=distributions
            )
        except ValueError as error:
            logger.warning("trial %d: its parameters are not used, as they do not fit: %s", record.number, error)
            return replace(record, parameters=None)
        return record

    def running(self) -> list[Record]:
        """What runs, anywhere, as of the last `changed`."""
        return [record for _, record in self._seen.values() if record.state == "running"]

    def begin(self, record: Record, excess: Mapping[str, float], total: int | None = None) -> Record | None:
        """Record a new running candidate; the result has its number. `excess` is what arithmetic knows of the limits.

        One commit when alone. With others, None: somebody has the same candidate, or there are `total` already.
        """
        parameters = record.parameters or parameters_of(record.schedule, self.config.space)
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
                "owner": self.owner,
                "attempts": [1],
            },
            constraints=dict(excess),
        )
        trial_id, number = self._create(trial)
        self._trial_ids[number], self._attempts[number] = trial_id, [1]
        why = None if self.alone else self._ask(lambda: self._why_void(record.uid, number, total))
        if why is not None:
            self._ask(lambda: self._void(trial_id, why))
            return None
        return replace(record, number=number, parameters=params or None, owner=self.owner)

    def begin_again(self, number: int) -> int | None:
        """Count another attempt at its rung, by this driver. Returns how many there were before; None: the driver that
        was taken for dead closed it meanwhile."""
        *earlier, before = self._attempts[number]
        try:
            self._begin_at(number, [*earlier, before + 1])
        except optuna.exceptions.UpdateFinishedTrialError:
            if self.alone:
                raise
            return None
        return before

    def promote(self, record: Record) -> bool:
        """Record that a paused candidate runs again, at `record.rung`. False: another driver was faster."""
        attempts = [*self._attempts[record.number][: record.rung], 1]
        if self.alone:  # the state comes last, as in `finish`
            self._begin_at(record.number, attempts)
            return self._ask(lambda: self._set_running(record.number))
        if not self._ask(lambda: self._claim_promotion(record)):
            return False
        self._begin_at(record.number, attempts)
        return True

    def take_over(self, record: Record) -> bool:
        """Make a running candidate of another driver this one's. False: somebody else did."""
        database = database_of(self._storage)
        if database is None or record.owner == self.owner:
            return True
        trial_id = self._trial_ids[record.number]
        of_owner = (_ATTRIBUTES.c.trial_id == trial_id) & (_ATTRIBUTES.c.key == "owner")
        is_as_before = _ATTRIBUTES.c.value_json == json.dumps(record.owner)
        change = sql.update(_ATTRIBUTES).where(of_owner & is_as_before).values(value_json=json.dumps(self.owner))

        def swap() -> bool:
            with database.engine.begin() as connection:
                return bool(connection.execute(change).rowcount == 1)

        return self._ask(swap)

    def finish(self, record: Record, evaluation: Evaluation) -> Record:
        """Record what came back, and pause or close the candidate. The state comes last: whoever sees it closed sees
        it whole.

        Doing it twice with the same evaluation is harmless as long as the first time was cut short. When another
        driver, which took this one for dead, closed the candidate first, that stays.
        """
        after = with_evaluation(record, evaluation, self.results, self._last_rung)
        self.results = max(self.results, after.orders[-1] + 1)
        try:
            self._ask(lambda: self._write_result(after, evaluation))
        except optuna.exceptions.UpdateFinishedTrialError:
            if self.alone:
                raise
        return after

    def confirm(self, uid: str, index: int, evaluation: Evaluation) -> None:
        """Record the index-th evaluation of a candidate after the search. Optuna closes finished trials to changes,
        so it belongs to the study."""
        name, value = f"confirm:{uid}:{index}", to_mapping(evaluation)
        self._ask(lambda: self._storage.set_study_user_attr(self._study_id, name, value))

    def starts(self, find: Callable[[], list[tuple[str, Schedule]]]) -> list[tuple[str, Schedule]]:
        """What is evaluated first, by origin, as `find` said when the study began: it needs files and measurements
        that a machine where the study is continued may not have."""
        saved = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)).get("starts")
        if saved is None:
            saved = [[origin, to_mapping(schedule)] for origin, schedule in find()]
            self._ask(lambda: self._storage.set_study_user_attr(self._study_id, "starts", saved))
        try:
            return [(str(origin), from_mapping(Schedule, schedule, origin)) for origin, schedule in saved]
        except (FileError, TypeError, ValueError) as error:
            raise StudyError(
                f"study {self.config.name!r}: its start schedules cannot be read: {error}. Possible: a study whose "
                f"storage is whole. Restore the storage from a copy, or give the search another name (--set name=...)."
            ) from error

    def define(self, find: Callable[[], Vocabulary]) -> None:
        """Keep what the study's scores and verbs mean, as `find` said when the study began. Raises StudyError when it
        says something else now."""
        saved = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)).get("vocabulary")
        now = find()
        if saved is not None:
            self.vocabulary = from_mapping(Vocabulary, saved, f"study {self.config.name}")
            refuse_other_defaults(self.vocabulary, now, self.config.name)
            return
        self.vocabulary = now
        self._ask(lambda: self._storage.set_study_user_attr(self._study_id, "vocabulary", to_mapping(now)))

    # --- drivers ---

    def beat(self, beat: Beat) -> None:
        """Say that this driver lives. Raises what the storage raises when it is away."""
        self._storage.set_study_user_attr(self._study_id, f"driver:{self.owner}", asdict(beat))

    def beats(self) -> dict[str, Beat]:
        """The last beat of every driver, by name."""
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        said = {name.removeprefix("driver:"): beat for name, beat in attributes.items() if name.startswith("driver:")}
        return {name: read for name, beat in said.items() if (read := _beat(beat)) is not None}

    # --- one operation each, harmless when done twice ---

    def _create(self, trial: FrozenTrial) -> tuple[int, int]:
        """Id and number of a new trial; of the one that is there when the first try worked and its answer was lost."""
        tries = 0

        def create() -> tuple[int, int]:
            nonlocal tries
            tries += 1
            if tries > 1:
                for other in _candidates(read_trials(self._storage, self._study_id)[0], self._first):
                    about = other.user_attrs
                    if (about.get("uid"), about.get("owner")) == (trial.user_attrs["uid"], self.owner):
                        return other._trial_id, other.number
            trial_id = self._storage.create_new_trial(self._study_id, template_trial=trial)
            return trial_id, self._storage.get_trial_number_from_id(trial_id)

        return self._ask(create)

    def _why_void(self, uid: str, number: int, total: int | None) -> str | None:
        """Why a trial is no candidate: an earlier one has the same uid, or as many as wanted are there without it.

        Whoever has a smaller number was written before this trial got its own.
        """
        database = database_of(self._storage)
        assert database is not None, "only databases have several drivers"
        joined = sql.join(_TRIALS, _ATTRIBUTES, _TRIALS.c.trial_id == _ATTRIBUTES.c.trial_id)
        earlier = (_TRIALS.c.study_id == self._study_id) & (_TRIALS.c.number < number)
        earlier &= (_TRIALS.c.number >= self._first) & _TRIALS.c.number.not_in(self.unreadable)
        is_void = _ATTRIBUTES.c.key == "void"
        is_same = (_ATTRIBUTES.c.key == "uid") & (_ATTRIBUTES.c.value_json == json.dumps(uid))
        rows = sql.select(_TRIALS.c.number, _ATTRIBUTES.c.key).select_from(joined).where(earlier & (is_void | is_same))
        with database.engine.begin() as connection:
            found = connection.execute(rows).all()
        void = {number for number, key in found if key == "void"}
        same = sorted(number for number, key in found if key == "uid" and number not in void)
        if same:
            return f"trial {same[0]} is the same"
        others = sum(self._first <= other < number for other in self.unreadable)
        before = number - self._first - len(void) - others
        return None if total is None or before < total else f"there are {total} candidates"

    def _void(self, trial_id: int, why: str) -> None:
        self._storage.set_trial_user_attr(trial_id, "void", why)
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _set_running(self, number: int) -> bool:
        return self._storage.set_trial_state_values(self._trial_ids[number], TrialState.RUNNING)

    def _claim_promotion(self, record: Record) -> bool:
        try:
            if not self._set_running(record.number):
                return False
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        trial_id = self._trial_ids[record.number]
        if f"rung:{record.rung}" not in self._storage.get_trial_user_attrs(trial_id):
            return True
        self._storage.set_trial_state_values(
            trial_id, TrialState.WAITING
        )  # another driver did this rung, and paused it
        return False

    def _begin_at(self, number: int, attempts: list[int]) -> None:
        self._attempts[number] = attempts
        trial_id = self._trial_ids[number]
        self._ask(lambda: self._storage.set_trial_user_attr(trial_id, "attempts", attempts))
        self._ask(lambda: self._storage.set_trial_user_attr(trial_id, "owner", self.owner))

    def _write_result(self, record: Record, evaluation: Evaluation) -> None:
        trial_id, values = self._trial_ids[record.number], dict(evaluation.metrics)
        about = {"order": record.orders[-1], **to_mapping(evaluation)}
        self._storage.set_trial_user_attr(trial_id, f"rung:{evaluation.rung}", about)
        if record.state == "paused":
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
            return
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


def open_store(
    config: StudyConfig,
    url: str,
    *,
    owner: str = "",
    alone: bool = True,
    on_wait: Callable[[str, float], bool] = lambda why, waited: True,
) -> Store:
    """Create the study, or continue it. Raises StudyError when it exists with other settings, with the differences.

    As long as no evaluation is complete, settings of `MAY_MEND` may differ too. Then the search starts over: the trials
    so far, which all failed or were cut short with the wrong settings, count no more (the study attribute "first" says
    from which number on they do). on_wait: see `Patience`.
    """
    storage, file = open_storage(url, writing=True), file_of(url)
    directions = [optuna.study.StudyDirection[f"{objective.goal}".upper()] for objective in config.objectives]
    with quiet_optuna(), storage_errors(file):
        try:
            study_id = storage.create_new_study(directions, config.name)
        except optuna.exceptions.DuplicatedStudyError:
            study_id = storage.get_study_id_from_name(config.name)
        attributes = storage.get_study_user_attrs(study_id)
        if "config" in attributes:
            trials, _ = read_trials(storage, study_id)
            may_mend = not _is_under_way(_candidates(trials, _first_number(attributes)), alone)
            if refuse_other_settings(config, attributes["config"], may_mend):
                storage.set_study_user_attr(study_id, "starts", None)
                storage.set_study_user_attr(study_id, "first", storage.get_n_trials(study_id))
        elif storage.get_n_trials(study_id) > 0:
            raise StudyError(
                f"study {config.name!r} in {shown(url)}: it has trials but was not made by prunesearch. "
                f"Possible: a new name. Change name in the study file."
            )
        else:
            _describe(storage, study_id, config)
        if attributes.get("config") != to_mapping(config):
            storage.set_study_user_attr(study_id, "config", to_mapping(config))  # last: it says that all is there
    store = Store(storage, study_id, config, owner, alone, Patience(on_wait=on_wait, file=file))
    store.file = file
    return store


def _is_under_way(trials: list[FrozenTrial], alone: bool) -> bool:
    """Whether anything was evaluated, or may be at this moment by another driver."""
    results = (trial.user_attrs[key] for trial in trials for key in _rung_keys(trial))
    is_evaluated = any(isinstance(result, Mapping) and result.get("status") == "complete" for result in results)
    return is_evaluated or (not alone and any(trial.state == TrialState.RUNNING for trial in trials))


def has_study(url: str, name: str) -> bool:
    """Whether a study was begun there, so that its storage knows its start schedules."""
    try:
        reader = open_study_readonly(storage=url, name=name)
    except (StudyError, RunError):
        return False
    reader.close()
    return reader.has_begun


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


@dataclass(frozen=True)
class _About:
    """What a trial says of its candidate in its attributes, besides the evaluations."""

    uid: str
    schedule: Schedule
    origin: str
    seed: int
    attempts: tuple[int, ...]
    owner: str = ""


def read_trials(storage: BaseStorage, study_id: int) -> tuple[list[FrozenTrial], dict[int, str]]:
    """All trials of a study that Optuna can read, and for the others, by number, why it cannot."""
    try:
        return storage.get_all_trials(study_id, deepcopy=False), {}
    except _DAMAGED:
        database = database_of(storage)
        if database is None:
            raise
        rows = sql.select(_TRIALS.c.trial_id, _TRIALS.c.number).where(_TRIALS.c.study_id == study_id)
        with database.engine.begin() as connection:
            found = connection.execute(rows.order_by(_TRIALS.c.number)).all()
        if not found:  # it is not the trials that are damaged
            raise
    trials, unreadable = [], {}
    for trial_id, number in found:
        try:
            trials.append(database.get_trial(trial_id))
        except _DAMAGED as error:
            unreadable[number] = f"Optuna cannot read it ({type(error).__name__}: {error})"
    return trials, unreadable


def read_record(trial: FrozenTrial, config: StudyConfig) -> Record | str:
    """The candidate of a trial, or why it cannot be read."""
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
    for key in _rung_keys(trial):
        order, evaluation = _evaluation(attributes[key], key)
        orders.append(order)
        evaluations.append(evaluation)
        problem = _evaluation_problem(evaluation, about.schedule, config)
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
    """How many evaluations came before it, and what it says."""
    said = dict(value) if isinstance(value, Mapping) else {}
    order = said.pop("order", None)
    if type(order) is not int:
        raise FileError(place, [f"order is {order!r}; possible: a whole number"])
    return order, from_mapping(Evaluation, said, place)


def _evaluation_problem(evaluation: Evaluation, schedule: Schedule, config: StudyConfig) -> str | None:
    """What an evaluation cannot say if it is one of this study."""
    verdict = judged(evaluation, config)
    if verdict.status != evaluation.status:
        return verdict.error
    if evaluation.rung not in range(len(config.rungs)):
        return f"rung {evaluation.rung}; the study has {len(config.rungs)}"
    last = max((stage.block for stage in (evaluation.schedule or schedule).stages), default=-1)
    if evaluation.tokens and last >= len(evaluation.tokens):
        return f"a stage at block {last} of a model with {len(evaluation.tokens)} blocks"
    return None


def _beat(value: Any) -> Beat | None:
    try:
        return from_mapping(Beat, value, "beat")
    except FileError as error:  # as good as none: its driver counts as silent
        logger.warning("a sign of life of a driver cannot be read: %s", error)
        return None


def _candidates(trials: list[FrozenTrial], first: int) -> list[FrozenTrial]:
    """By number, from the first that counts, without those that are void."""
    found = [trial for trial in trials if trial.number >= first and "void" not in trial.user_attrs]
    return sorted(found, key=lambda trial: trial.number)


def _first_number(attributes: Mapping[str, Any]) -> int:
    """The number of the first trial that counts: see `open_store`."""
    first = attributes.get("first", 0)
    return first if type(first) is int else 0


def _marks(trial: FrozenTrial) -> object:
    """What tells whether a trial is as it was."""
    about = trial.user_attrs
    return trial.state, about.get("attempts"), about.get("owner"), _rung_keys(trial)


def _confirmations(attributes: Mapping[str, Any], uid: str) -> tuple[Evaluation, ...]:
    """The evaluations after the search that can be read, in their order."""
    prefix, found = f"confirm:{uid}:", {}
    for name, value in attributes.items():
        index = name.removeprefix(prefix)
        if name.startswith(prefix) and index.isdecimal():
            try:
                found[int(index)] = from_mapping(Evaluation, value, name)
            except FileError as error:
                logger.warning("%s; it is left out", error)
    return tuple(found[index] for index in sorted(found))


def _rung_keys(trial: FrozenTrial) -> list[str]:
    """Names of the attributes that hold its evaluations, lowest rung first."""
    rungs = [name.removeprefix("rung:") for name in trial.user_attrs if name.startswith("rung:")]
    return [f"rung:{rung}" for rung in sorted((rung for rung in rungs if rung.isdecimal()), key=int)]
