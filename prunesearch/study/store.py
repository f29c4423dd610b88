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

Several drivers may write to one database. Creating a trial, promoting it, taking it over, beginning it again and
writing its result are each one transaction (`rows.py`), which changes nothing unless the trial is as the driver
believes: so each of these happens for one driver only. A result is written by the owner only, and once for each rung.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from hashlib import blake2b
from importlib import metadata
from typing import Any, TypeVar

import optuna
import sqlalchemy as sql
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from prunesearch.config import StudyConfig
from prunesearch.errors import FileError, StudyError
from prunesearch.evaluate.limits import excess
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record, with_evaluation
from prunesearch.schedule import Schedule
from prunesearch.space.choices import parameters_of
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.study import rows
from prunesearch.study.differences import refuse_other_settings
from prunesearch.study.distributions import parameters_and_distributions, quiet_optuna
from prunesearch.study.lost_database import DatabaseFile, contradiction
from prunesearch.study.reader import (
    Beat,
    Claim,
    StudyReader,
    as_said,
    candidates_of,
    confirmations_of,
    first_number,
    read_record,
    read_trials,
    rung_keys,
)
from prunesearch.study.storage import (
    Patience,
    database_of,
    file_of,
    open_storage,
    shown,
    storage_errors,
)
from prunesearch.study.vocabulary import Vocabulary, refuse_other_defaults

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Store(StudyReader):
    """A study that a driver writes to.

    owner: the name of the driver. alone: no other driver writes, so that nothing need be claimed. patience: calls the
    storage, and waits when it is away. url: of the storage.

    In a database each method that writes is one transaction, which first looks whether everything is still as this
    driver believes; when it is not, nothing is changed, and the caller is told. Raises RunError when the database is
    not the one that was opened, or lacks what this driver wrote to it.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        config: StudyConfig,
        owner: str = "",
        alone: bool = True,
        patience: Patience | None = None,
        url: str = "memory:",
    ) -> None:
        super().__init__(storage, study_id, config)
        self.owner, self.alone, self._patience = owner, alone, patience or Patience()
        self._database = database_of(storage)
        self._last_rung = len(config.rungs) - 1
        self._trial_ids: dict[int, int] = {}
        self._attempts: dict[int, list[int]] = {}
        self._seen: dict[str, tuple[object, Record]] = {}
        self._unreported: dict[str, None] = {}
        self.results = 0
        """Evaluations in the study so far."""
        self.file = path = file_of(url)
        self._where = str(path or f"study {config.name}")
        self._file: DatabaseFile | None = None
        self._mark_key, self._mark = "written" if alone else f"written:{owner}", uuid.uuid4().hex
        """What this driver wrote last there. Whatever else is found, the database was changed behind its back."""
        if self._database is not None:
            self._write_mark()
        if path is not None:  # after the first write, when all its files are there
            self._file = DatabaseFile(path, only_grows=self._database is None)
        self._first = first_number(self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)))
        self._refresh()
        self._unreported.clear()

    def records(self) -> list[Record]:
        """As of a reader; only what changed is read again. Does not change what `poll` reports."""
        self._refresh()
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        known = sorted((record for _, record in self._seen.values()), key=lambda record: record.number)
        return [replace(record, confirmations=confirmations_of(attributes, record.uid)) for record in known]

    def poll(self) -> list[Record]:
        """Candidates that are new or changed since the last `poll` (at first: since the study was opened), in the order
        of their numbers."""
        self._refresh()
        found = [self._seen[uid][1] for uid in self._unreported]
        self._unreported.clear()
        return sorted(found, key=lambda record: record.number)

    def running(self) -> list[Record]:
        """What runs, anywhere, as of the last look at the storage."""
        return [record for _, record in self._seen.values() if record.state == "running"]

    def find(self, uid: str) -> Record | None:
        """A candidate as it is now."""
        self._refresh()
        return self._seen[uid][1] if uid in self._seen else None

    def begin(self, record: Record, excess: Mapping[str, float], total: int | None = None) -> Record | None:
        """Record a new running candidate; the result has its number. `excess` is what arithmetic knows of the limits.

        With other drivers, None: somebody has the same candidate, or there are `total` already. Raises ValueError when
        the record's parameters are not those of the space.
        """
        trial = self._template(record, excess)
        if self._database is None:
            trial_id = self._ask(lambda: self._storage.create_new_trial(self._study_id, template_trial=trial))
            created = trial_id, self._ask(lambda: self._storage.get_trial_number_from_id(trial_id))
        else:
            found = self._create(trial, excess, total)
            if found is None:
                return None
            created = found
        trial_id, number = created
        self._trial_ids[number], self._attempts[number] = trial_id, [1]
        return replace(record, number=number, parameters=dict(trial.params) or None, owner=self.owner)

    def check(self, record: Record, excess: Mapping[str, float]) -> None:
        """Raise ValueError when `begin` would, without writing anything."""
        self._template(record, excess)

    def begin_again(self, number: int) -> int | None:
        """Count another attempt at its rung, by this driver. Returns how many there were before; None: it is not this
        driver's any more, or has its result."""
        trial_id = self._trial_ids[number]
        if self._database is None:
            *earlier, before = self._attempts[number]
            self._begin_at(number, [*earlier, before + 1])
            return before

        def swap(connection: sql.Connection) -> list[int] | None:
            trial = rows.lock_trial(connection, trial_id)
            if trial.state != "RUNNING" or not self._is_mine(trial) or trial.has(trial.rung):
                return None
            attempts = [*trial.attempts[:-1], trial.attempts[-1] + 1]
            rows.change_trial(connection, trial, attributes={"attempts": attempts, "owner": self.owner})
            return attempts

        attempts = self._change(swap)
        if attempts is None:
            return None
        self._attempts[number] = attempts
        return attempts[-1] - 1

    def promote(self, record: Record) -> bool:
        """Record that a paused candidate runs again, at `record.rung`. False: another driver was faster."""
        trial_id = self._trial_ids[record.number]
        if self._database is None:  # the state comes last, as in `finish`
            self._begin_at(record.number, [*self._attempts[record.number][: record.rung], 1])
            return self._ask(lambda: self._storage.set_trial_state_values(trial_id, TrialState.RUNNING))

        def swap(connection: sql.Connection) -> list[int] | None:
            trial = rows.lock_trial(connection, trial_id)
            attempts = [*trial.attempts[: record.rung], 1]
            if trial.state == "RUNNING" and (trial.attempts, trial.owner) == (attempts, self.owner):
                return attempts  # done before, and only the database's answer was lost
            is_next = trial.has(record.rung - 1) and not trial.has(record.rung)
            if trial.state != "WAITING" or not is_next:
                return None
            changes = {"attempts": attempts, "owner": self.owner}
            rows.change_trial(connection, trial, state="RUNNING", attributes=changes)
            return attempts

        attempts = self._change(swap)
        if attempts is None:
            return False
        self._attempts[record.number] = attempts
        return True

    def take_over(self, record: Record) -> bool:
        """Make a running candidate of another driver this one's, unless anything happened to it since it was read.
        False: something did."""
        if self._database is None or record.owner == self.owner:
            return True
        trial_id, attempts = self._trial_ids[record.number], self._attempts[record.number]

        def swap(connection: sql.Connection) -> bool:
            trial = rows.lock_trial(connection, trial_id)
            is_as_read = (trial.state, trial.attempts) == ("RUNNING", attempts)
            if not is_as_read or trial.owner not in (record.owner, self.owner):
                return False
            rows.change_trial(connection, trial, attributes={"owner": self.owner})
            return True

        return self._change(swap)

    def finish(self, record: Record, evaluation: Evaluation) -> Record | None:
        """Record what came back, and pause or close the candidate. None: the candidate is another driver's by now, or
        has another result at this rung; nothing is changed. To the only driver that cannot happen, and is a RunError.

        Doing it twice with the same evaluation is harmless.
        """
        after = with_evaluation(record, evaluation, self.results, self._last_rung)
        if self._database is None:
            self._ask(lambda: self._write_result(after, evaluation))
        elif not self._change(lambda connection: self._swap_result(connection, after, evaluation)):
            if self.alone:
                raise contradiction(self._where, f"candidate {record.number} does not wait for rung {evaluation.rung}")
            return None
        self.results = max(self.results, after.orders[-1] + 1)
        return after

    def holds(self, number: int, rung: int) -> bool:
        """Whether the storage has the result of a candidate at a rung, asked anew."""
        trial_id, database = self._trial_ids[number], self._database
        if database is None:
            return f"rung:{rung}" in self._ask(lambda: self._storage.get_trial(trial_id)).user_attrs

        def look() -> bool:
            with database.engine.begin() as connection:
                return rows.holds(connection, trial_id, rung)

        return self._ask(look)

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

    # --- confirmations ---

    def confirm(self, uid: str, index: int, evaluation: Evaluation) -> bool:
        """Record the index-th evaluation of a candidate after the search. False: it is there already. Optuna closes
        finished trials to changes, so it belongs to the study."""
        name, value = f"confirm:{uid}:{index}", to_mapping(evaluation)
        if self._database is None:
            self._ask(lambda: self._storage.set_study_user_attr(self._study_id, name, value))
            return True

        def swap(connection: sql.Connection) -> bool:
            rows.lock_study(connection, self._study_id)
            rows.delete_study_attribute(connection, self._study_id, f"confirming:{evaluation.uid}")
            known = rows.study_attribute(connection, self._study_id, name)
            if known is not None and known["uid"] == evaluation.uid:
                return bool(known == value)
            rows.set_study_attribute(connection, self._study_id, name, value)
            return True

        return self._change(swap)

    def claims(self) -> dict[str, Claim]:
        """Who evaluates a candidate again, or did in vain, by the uid of the task."""
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        prefix = "confirming:"
        said = {name.removeprefix(prefix): value for name, value in attributes.items() if name.startswith(prefix)}
        return {
            name: read for name, value in said.items() if (read := as_said(Claim, value, f"claim {name}")) is not None
        }

    def claim(self, uid: str, index: int, name: str, before: Claim | None) -> bool:
        """Claim the index-th evaluation of a candidate again, whose task has the uid `name`. before: the claim that is
        replaced, None where there was none. False: somebody else was faster."""
        if self._database is None:
            return True
        key, mine = f"confirming:{name}", Claim(self.owner)

        def swap(connection: sql.Connection) -> bool:
            rows.lock_study(connection, self._study_id)
            found = rows.study_attribute(connection, self._study_id, key)
            known = rows.study_attribute(connection, self._study_id, f"confirm:{uid}:{index}")
            if (known is not None and known["uid"] == name) or found not in (before and asdict(before), asdict(mine)):
                return False
            rows.set_study_attribute(connection, self._study_id, key, asdict(mine))
            return True

        return self._change(swap)

    def give_up(self, name: str, failed: bool) -> None:
        """End this driver's claim of a confirmation, if it still has it. failed: nobody else need try at once."""

        def swap(connection: sql.Connection) -> None:
            rows.lock_study(connection, self._study_id)
            key = f"confirming:{name}"
            if rows.study_attribute(connection, self._study_id, key) != asdict(Claim(self.owner)):
                return
            if failed:
                rows.set_study_attribute(connection, self._study_id, key, asdict(Claim(self.owner, failed=True)))
            else:
                rows.delete_study_attribute(connection, self._study_id, key)

        if self._database is not None:
            self._change(swap)

    # --- drivers ---

    def beat(self, beat: Beat, *, patiently: bool = False) -> None:
        """Say that this driver lives. Raises what the storage raises when it is away, unless patiently."""

        def say() -> None:
            self._storage.set_study_user_attr(self._study_id, f"driver:{self.owner}", asdict(beat))

        if patiently:
            self._ask(say)
        else:
            if self._file is not None:
                self._file.check()
            say()

    def beats(self) -> dict[str, Beat]:
        """The last beat of every driver, by name."""
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        said = {name.removeprefix("driver:"): beat for name, beat in attributes.items() if name.startswith("driver:")}
        return {
            name: read for name, beat in said.items() if (read := as_said(Beat, beat, f"driver {name}")) is not None
        }

    # --- within ---

    def _ask(self, operation: Callable[[], T]) -> T:
        """Call the storage, patiently, and make sure that it is the one that was opened, before and after."""

        def ask() -> T:
            if self._file is not None:
                self._file.check()
            try:
                found = operation()
            except (KeyError, rows.Missing) as error:
                raise contradiction(self._where, str(error.args[0] if error.args else error)) from error
            if self._file is not None:
                self._file.check()
            return found

        return self._patience(ask)

    def _change(self, operation: Callable[[sql.Connection], T]) -> T:
        """Call an operation in a transaction of a database that still holds what this driver wrote last."""
        database, mark = self._database, uuid.uuid4().hex
        assert database is not None

        def change() -> T:
            with database.engine.begin() as connection:
                # the new mark is there when an earlier try came through and only its answer was lost
                known = (self._mark, mark)
                if not rows.swap_study_attribute(connection, self._study_id, self._mark_key, known, mark):
                    raise rows.Missing("the database lacks what this search wrote to it last")
                return operation(connection)

        found = self._ask(change)
        self._mark = mark
        return found

    def _write_mark(self) -> None:
        database = self._database
        assert database is not None

        def write() -> None:
            with database.engine.begin() as connection:
                rows.lock_study(connection, self._study_id)
                rows.set_study_attribute(connection, self._study_id, self._mark_key, self._mark)

        self._ask(write)

    def _refresh(self) -> None:
        """Read what changed in the storage."""
        trials, unreadable = self._ask(lambda: read_trials(self._storage, self._study_id))
        if self._database is not None:
            self._check_mark()
        for trial in candidates_of(trials, self._first):
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
            self._unreported[uid] = None
        self._leave_out(unreadable)

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

    def _check_mark(self) -> None:
        database = self._database
        assert database is not None

        def look() -> None:
            with database.engine.begin() as connection:
                if rows.study_attribute(connection, self._study_id, self._mark_key) != self._mark:
                    raise rows.Missing("the database lacks what this search wrote to it last")

        self._ask(look)

    def owns(self, record: Record) -> bool:
        """Whether a candidate that runs is this driver's."""
        return self.alone or record.owner == self.owner

    def _is_mine(self, trial: rows.Trial) -> bool:
        return self.alone or trial.owner == self.owner

    def _template(self, record: Record, excess: Mapping[str, float]) -> FrozenTrial:
        parameters = record.parameters or parameters_of(record.schedule, self.config.space)
        params, distributions = parameters_and_distributions(self.config.space, parameters)
        return optuna.trial.create_trial(
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

    def _create(self, trial: FrozenTrial, excess: Mapping[str, float], total: int | None) -> tuple[int, int] | None:
        """Id and number of a new trial; None when it would be no candidate."""
        about, tries = trial.user_attrs, 0
        parameters = {
            name: (
                trial.distributions[name].to_internal_repr(value),
                optuna.distributions.distribution_to_json(trial.distributions[name]),
            )
            for name, value in trial.params.items()
        }

        def swap(connection: sql.Connection) -> tuple[int, int] | None:
            nonlocal tries
            tries += 1
            rows.lock_study(connection, self._study_id)
            if not self.alone or tries > 1:  # alone, it cannot be there but from an earlier try
                same, known = rows.candidates_with(
                    connection, self._study_id, about["uid"], self._first, self.unreadable
                )
                if same:
                    is_mine = tries > 1 and rows.lock_trial(connection, same[0][0]).owner == self.owner
                    return same[0] if is_mine else None
                if not self.alone and total is not None and known >= total:
                    return None
            return rows.create_trial(connection, self._study_id, parameters, about, excess)

        return self._change(swap)

    def _swap_result(self, connection: sql.Connection, record: Record, evaluation: Evaluation) -> bool:
        """Write a result if it is this driver's to write; whether it is there."""
        trial = rows.lock_trial(connection, self._trial_ids[record.number])
        runs = trial.state == "RUNNING" and trial.rung == evaluation.rung
        key, about = f"rung:{evaluation.rung}", {"order": record.orders[-1], **to_mapping(evaluation)}
        if key in trial.texts:
            known = {**json.loads(trial.texts[key]), "order": about["order"]}
            is_same = json.dumps(known, sort_keys=True) == json.dumps(about, sort_keys=True)
            if not is_same or not runs:
                return is_same
        elif not runs or not self._is_mine(trial):
            return False
        attributes: dict[str, Any] = {key: about}
        if record.state == "paused":
            rows.change_trial(connection, trial, state="WAITING", attributes=attributes)
            return True
        values = dict(evaluation.metrics)
        objectives = [values[objective.metric] for objective in self.config.objectives if record.state == "complete"]
        if record.state == "failed":
            attributes["error"] = evaluation.cause
        rows.change_trial(
            connection,
            trial,
            state="COMPLETE" if record.state == "complete" else "FAIL",
            attributes=attributes,
            constraints=excess(self.config.limits, values),
            values=objectives,
        )
        return True

    # --- journals and memory have one driver; each step is harmless when it is done twice ---

    def _begin_at(self, number: int, attempts: list[int]) -> None:
        self._attempts[number] = attempts
        trial_id = self._trial_ids[number]
        self._ask(lambda: self._storage.set_trial_user_attr(trial_id, "attempts", attempts))
        self._ask(lambda: self._storage.set_trial_user_attr(trial_id, "owner", self.owner))

    def _write_result(self, record: Record, evaluation: Evaluation) -> None:
        """The state comes last: whoever sees it closed sees it whole."""
        trial_id, values = self._trial_ids[record.number], dict(evaluation.metrics)
        about = {"order": record.orders[-1], **to_mapping(evaluation)}
        self._storage.set_trial_user_attr(trial_id, f"rung:{evaluation.rung}", about)
        if record.state == "paused":
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
            return
        known = self._storage.get_trial_system_attrs(trial_id)
        for name, amount in excess(self.config.limits, values).items():
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
            may_mend = not _is_under_way(candidates_of(trials, first_number(attributes)), alone)
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
    return Store(storage, study_id, config, owner, alone, Patience(on_wait=on_wait, file=file), url)


def _is_under_way(trials: list[FrozenTrial], alone: bool) -> bool:
    """Whether anything was evaluated, or may be at this moment by another driver."""
    results = (trial.user_attrs[key] for trial in trials for key in rung_keys(trial))
    is_evaluated = any(isinstance(result, Mapping) and result.get("status") == "complete" for result in results)
    return is_evaluated or (not alone and any(trial.state == TrialState.RUNNING for trial in trials))


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


def _marks(trial: FrozenTrial) -> object:
    """What tells whether a trial is as it was."""
    about = trial.user_attrs
    return trial.state, about.get("attempts"), about.get("owner"), rung_keys(trial)
