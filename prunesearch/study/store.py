"""Write a study to Optuna's storage, one trial per candidate. Only this file (and `rows.py` for it) writes there.

Optuna stores parameters, values, state, constraints and times of a trial. Its user attributes are:

    uid        identity of the canonical schedule
    schedule   as in a schedule file
    origin     dense, "start: NAME" or sampler
    seed       of its task
    owner      the driver that runs it or ran it last
    attempts   how often each rung was begun
    rung:0 ... the Evaluation of each rung; its `order` is how many evaluations the study had before
    error      why it failed: oom, crash, timeout, nan, ...
    void       why it is no candidate (written by earlier versions)

States of a trial: RUNNING becomes WAITING (for a promotion) with the evaluation of a lower rung, COMPLETE with that of
the last rung, and FAIL when an evaluation fails. A promotion makes WAITING RUNNING again. A trial may wait forever,
because a study can always be continued with more candidates. All COMPLETE trials had the same budget.

Optuna does not document the storage methods `create_new_trial` and `set_trial_state_values` as stable, hence the pin
`optuna < 6`.

Several drivers may write to one database. Creating a trial, promoting it, taking it over, beginning it again and
writing its result are one transaction each (`rows.py`). A transaction changes nothing when the trial is not in the
state that the driver expects, so only one driver succeeds. Only the owner writes a result, once for each rung.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
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
from prunesearch.record import Record, Sibling, with_evaluation
from prunesearch.relative_limits import limits_at
from prunesearch.schedule import Schedule
from prunesearch.space.choices import parameters_of
from prunesearch.space.vocabulary import Vocabulary, refuse_other_defaults
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.study import rows
from prunesearch.study.differences import digest_of_file, refuse_other_settings, refuse_other_weights
from prunesearch.study.distributions import parameters_and_distributions, quiet_optuna
from prunesearch.study.lock import is_driver_name, is_drivers_file
from prunesearch.study.lost_database import DatabaseFile, contradiction
from prunesearch.study.reader import (
    Beat,
    Claim,
    StudyReader,
    as_said,
    candidates_of,
    confirmations_of,
    first_number,
    measured_beside,
    read_record,
    read_trials,
    rung_keys,
    siblings_of,
)
from prunesearch.study.storage import (
    Patience,
    database_of,
    file_of,
    open_storage,
    shown,
    storage_errors,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Store(StudyReader):
    """A study that a driver writes to.

    owner: name of the driver. alone: no other driver writes. patience: calls the storage and retries while it is
    unavailable. url: of the storage.

    In a database each method that changes a trial or a confirmation is one transaction. It checks first that the stored
    state is as this driver expects. If not, it changes nothing and returns None or False. Methods raise RunError when
    the database was replaced or lacks what this driver wrote to it.
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
        self._dense: Record | None = None
        self.results = 0
        """Number of evaluations in the study so far."""
        self.file = path = file_of(url)
        self._where = str(path or f"study {config.name}")
        self._file: DatabaseFile | None = None
        self._mark_key, self._mark = "written" if alone else f"written:{owner}", uuid.uuid4().hex
        """A study attribute and its random value, new with each change. Another value there means another database."""
        if self._database is not None:
            self._write_mark()
        if path is not None:  # after the first write, so that all files of the storage exist
            self._file = DatabaseFile(path, only_grows=self._database is None)
        self._first = first_number(self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)))
        self._refresh()
        self._unreported.clear()

    def records(self) -> list[Record]:
        """All candidates that can be read, by number; parses changed trials only. Does not affect `poll`."""
        self._refresh()
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        known = sorted((record for _, record in self._seen.values()), key=lambda record: record.number)
        return measured_beside(known, attributes)

    def poll(self) -> list[Record]:
        """Candidates that are new or changed since the last `poll` (or since the study was opened), by number."""
        self._refresh()
        found = [self._seen[uid][1] for uid in self._unreported]
        self._unreported.clear()
        return sorted(found, key=lambda record: record.number)

    def running(self) -> list[Record]:
        """Running candidates of all drivers, as of the last read of the storage."""
        return [record for _, record in self._seen.values() if record.state == "running"]

    def find(self, uid: str) -> Record | None:
        """The present state of a candidate; None if the study lacks it."""
        self._refresh()
        return self._seen[uid][1] if uid in self._seen else None

    def begin(self, record: Record, excess: Mapping[str, float], total: int | None = None) -> Record | None:
        """Store a new running candidate; returns it with its number.

        Returns None when another driver has stored the same candidate, or `total` candidates already exist. Raises
        ValueError when the parameters do not fit the space.

        excess: by how much it breaks each limit that can be computed without running.
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
        """Raise the ValueError that `begin` would raise, without writing."""
        self._template(record, excess)

    def begin_again(self, number: int) -> int | None:
        """Count another attempt of a running candidate at its rung; returns how many there were before.

        None: another driver has taken it over, or its result is stored.
        """
        trial_id = self._trial_ids[number]
        if self._database is None:
            *earlier, before = self._attempts[number]
            self._begin_at(number, [*earlier, before + 1])
            return before

        def swap(connection: sql.Connection) -> list[int] | None:
            trial = rows.lock_trial(connection, trial_id)
            if trial.state != "RUNNING" or not self.owns(trial) or trial.has(trial.rung):
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
        """Set a paused candidate running at `record.rung`. False: another driver was faster."""
        trial_id = self._trial_ids[record.number]
        if self._database is None:  # the state comes last, as in `_write_result`
            self._begin_at(record.number, [*self._attempts[record.number][: record.rung], 1])
            return self._ask(lambda: self._storage.set_trial_state_values(trial_id, TrialState.RUNNING))

        def swap(connection: sql.Connection) -> list[int] | None:
            trial = rows.lock_trial(connection, trial_id)
            attempts = [*trial.attempts[: record.rung], 1]
            if trial.state == "RUNNING" and (trial.attempts, trial.owner) == (attempts, self.owner):
                return attempts  # an earlier try succeeded, but its answer was lost
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
        """Make this driver the owner of a running candidate. False when the candidate has changed since it was read."""
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
        """Store an evaluation and pause or close its candidate; returns the changed record.

        None: another driver has taken the candidate over, or it has another result at this rung; nothing is changed.
        For a driver that is alone this raises RunError. Safe to repeat with the same evaluation.
        """
        after = with_evaluation(record, evaluation, self.results, self._last_rung)
        if self._database is None:
            self._ask(lambda: self._write_result(after, evaluation))
        elif not self._change(lambda connection: self._swap_result(connection, after, evaluation)):
            if self.alone:
                raise contradiction(self._where, f"candidate {record.number} does not wait for rung {evaluation.rung}")
            return None
        self.results = max(self.results, after.orders[-1] + 1)
        self._dense = after if after.origin == "dense" else self._dense
        return after

    def holds(self, number: int, rung: int) -> bool:
        """Whether the storage has the result of a candidate at a rung. Always reads the storage."""
        trial_id, database = self._trial_ids[number], self._database
        if database is None:
            return f"rung:{rung}" in self._ask(lambda: self._storage.get_trial(trial_id)).user_attrs

        def look() -> bool:
            with database.engine.begin() as connection:
                return rows.holds(connection, trial_id, rung)

        return self._ask(look)

    def starts(self, find: Callable[[], list[tuple[str, Schedule]]]) -> list[tuple[str, Schedule]]:
        """The stored (origin, schedule) of what is evaluated first; when none are stored, store what `find` returns.

        They are stored because `find` needs files and measurements that may be missing where the study is continued.
        """
        saved = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)).get("starts")
        if saved is None:
            saved = self.agree("starts", [[origin, to_mapping(schedule)] for origin, schedule in find()])
        try:
            return [(str(origin), from_mapping(Schedule, schedule, origin)) for origin, schedule in saved]
        except (FileError, TypeError, ValueError) as error:
            raise StudyError(
                f"study {self.config.name!r}: its start schedules cannot be read: {error}. Possible: a study whose "
                f"storage is whole. Restore the storage from a copy, or give the search another name (--set name=...)."
            ) from error

    def define(self, find: Callable[[], Vocabulary]) -> None:
        """Store the vocabulary that `find` returns when the study begins. Later, raise StudyError when a default in it
        has changed."""
        saved = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)).get("vocabulary")
        now = find()
        if saved is None:
            saved = self.agree("vocabulary", to_mapping(now))
        self.vocabulary = from_mapping(Vocabulary, saved, f"study {self.config.name}")
        refuse_other_defaults(self.vocabulary, now, self.config.name)

    def agree(self, name: str, mine: Any) -> Any:
        """Store an attribute of the study unless it is there; returns the stored one.

        Drivers that begin a study at the same moment go on with the same value: that of the first.
        """
        if self._database is None:
            self._ask(lambda: self._storage.set_study_user_attr(self._study_id, name, mine))
            return mine

        def set_if_missing(connection: sql.Connection) -> Any:
            rows.lock_study(connection, self._study_id)
            known = rows.study_attribute(connection, self._study_id, name)
            if known is None:
                rows.set_study_attribute(connection, self._study_id, name, mine)
            return mine if known is None else known

        return self._change(set_if_missing)

    def hold_weights(self, checkpoint: str, is_evaluated: bool) -> None:
        """Store the hash of the checkpoint as long as nothing is evaluated. Later, raise StudyError when the file has
        changed, because results of other weights do not compare."""
        now = digest_of_file(checkpoint)
        saved = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)).get("weights")
        if saved is not None and is_evaluated:
            refuse_other_weights(self.config.name, checkpoint, now, saved)
        elif saved != now:
            self._ask(lambda: self._storage.set_study_user_attr(self._study_id, "weights", now))

    def siblings(self) -> list[Sibling]:
        return siblings_of(self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)))

    def name_siblings(self, siblings: Iterable[Sibling]) -> None:
        """Store which dense siblings the study has. Readers need it, because finding them needs timm."""
        named = {sibling.uid: to_mapping(sibling.model) for sibling in siblings}
        saved = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id)).get("siblings", {})
        if saved != named:
            self._ask(lambda: self._storage.set_study_user_attr(self._study_id, "siblings", named))

    # --- confirmations ---
    # The evaluation of a dense sibling is stored and claimed as confirmation 0 of the sibling's uid.

    def confirm(self, uid: str, index: int, evaluation: Evaluation) -> bool:
        """Store the index-th confirmation of a candidate. False: a different result of the same task is stored already.

        It is an attribute of the study, because Optuna does not allow changes of finished trials.
        """
        name, value = f"confirm:{uid}:{index}", to_mapping(evaluation)
        if self._database is None:
            self._ask(lambda: self._storage.set_study_user_attr(self._study_id, name, value))
            return True

        def swap(connection: sql.Connection) -> bool:
            rows.lock_study(connection, self._study_id)
            rows.delete_study_attribute(connection, self._study_id, f"confirming:{evaluation.uid}")
            known = rows.study_attribute(connection, self._study_id, name)
            if _is_result_of(known, evaluation.uid):
                return bool(known == value)
            rows.set_study_attribute(connection, self._study_id, name, value)
            return True

        return self._change(swap)

    def confirmed(self, uid: str) -> list[str]:
        """Uids of the tasks whose results are stored as confirmations of a candidate."""
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        return [one.uid for one in confirmations_of(attributes, uid)]

    def claims(self) -> dict[str, Claim]:
        """The claims of confirmations that run or have failed: uid of the task -> claim."""
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        prefix = "confirming:"
        said = {name.removeprefix(prefix): value for name, value in attributes.items() if name.startswith(prefix)}
        return {name: claim for name, value in said.items() if (claim := _claim_from(value, name)) is not None}

    def claim(self, uid: str, index: int, name: str, before: Claim | None) -> bool:
        """Claim the index-th confirmation of a candidate. False: another driver was faster, or the result is there.

        name: uid of its task. before: the claim to replace; None if there is none.
        """
        if self._database is None:
            return True
        key, mine = f"confirming:{name}", Claim(self.owner)

        def swap(connection: sql.Connection) -> bool:
            rows.lock_study(connection, self._study_id)
            found = rows.study_attribute(connection, self._study_id, key)
            known = rows.study_attribute(connection, self._study_id, f"confirm:{uid}:{index}")
            claimed = None if found is None else _claim_from(found, name)
            if _is_result_of(known, name) or claimed not in (before, mine):
                return False
            rows.set_study_attribute(connection, self._study_id, key, asdict(mine))
            return True

        return self._change(swap)

    def give_up(self, name: str, failed: bool) -> None:
        """Release this driver's claim of a confirmation. failed: mark it as failed, so that others do not try now."""

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
        """Store a sign of life of this driver. patiently: retry; otherwise errors of the storage are raised at once."""

        def say() -> None:
            self._storage.set_study_user_attr(self._study_id, f"driver:{self.owner}", asdict(beat))

        if patiently:
            self._ask(say)
        else:
            if self._file is not None:
                self._file.check()
            say()

    def beats(self) -> dict[str, Beat]:
        """The last beat of every driver, by name. Left out: those that no driver can have written."""
        attributes = self._ask(lambda: self._storage.get_study_user_attrs(self._study_id))
        said = {name.removeprefix("driver:"): beat for name, beat in attributes.items() if name.startswith("driver:")}
        read = {name: as_said(Beat, beat, f"driver {name}") for name, beat in said.items() if is_driver_name(name)}
        return {name: beat for name, beat in read.items() if beat is not None and is_drivers_file(beat.place)}

    # --- within ---

    def _ask(self, operation: Callable[[], T]) -> T:
        """Call the storage with retries. Checks before and after that its file was not replaced."""

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
        """Run an operation in a transaction. Raises RunError when the mark that this driver wrote last is gone."""
        database, mark = self._database, uuid.uuid4().hex
        assert database is not None

        def change() -> T:
            with database.engine.begin() as connection:
                # the new mark is there if an earlier try succeeded but its answer was lost
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
        """Read the trials, and parse those that changed."""
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
            self._dense = record if record.origin == "dense" else self._dense
            self._trial_ids[trial.number] = trial._trial_id
            self._attempts[trial.number] = list(trial.user_attrs["attempts"])
            self._unreported[uid] = None
        self._leave_out(unreadable)

    def _with_fitting_parameters(self, record: Record) -> Record:
        """Drop parameters that do not fit the space. The schedule holds the same information."""
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

    def owns(self, record: Record | rows.Trial) -> bool:
        """Whether this driver is the owner of a running candidate."""
        return self.alone or record.owner == self.owner

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
        """Insert a trial; returns (id, number). None when its candidate exists or there are `total` candidates."""
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
            if not self.alone or tries > 1:  # a driver that is alone can only meet its own earlier try
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

    def _excess(self, record: Record, evaluation: Evaluation) -> dict[str, float]:
        """By how much a result breaks each limit. Limits that wait for the dense model's result are left out, for good:
        Optuna does not allow changes of finished trials, and the search itself does not read them."""
        dense = record if record.origin == "dense" else self._dense
        return excess(limits_at(self.config, dense, evaluation.rung), dict(evaluation.metrics))

    def _swap_result(self, connection: sql.Connection, record: Record, evaluation: Evaluation) -> bool:
        """Store a result if this driver owns the running trial; returns whether the result is stored."""
        trial = rows.lock_trial(connection, self._trial_ids[record.number])
        runs = trial.state == "RUNNING" and trial.rung == evaluation.rung
        key, about = f"rung:{evaluation.rung}", {"order": record.orders[-1], **to_mapping(evaluation)}
        if key in trial.texts:
            known = {**json.loads(trial.texts[key]), "order": about["order"]}
            is_same = json.dumps(known, sort_keys=True) == json.dumps(about, sort_keys=True)
            if not is_same or not runs:
                return is_same
        elif not runs or not self.owns(trial):
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
            constraints=self._excess(record, evaluation),
            values=objectives,
        )
        return True

    # --- journals and memory: one driver, single writes that are safe to repeat ---

    def _begin_at(self, number: int, attempts: list[int]) -> None:
        self._attempts[number] = attempts
        trial_id = self._trial_ids[number]
        self._ask(lambda: self._storage.set_trial_user_attr(trial_id, "attempts", attempts))
        self._ask(lambda: self._storage.set_trial_user_attr(trial_id, "owner", self.owner))

    def _write_result(self, record: Record, evaluation: Evaluation) -> None:
        """Write the state last, so that a reader never sees a closed trial without its result."""
        trial_id, values = self._trial_ids[record.number], dict(evaluation.metrics)
        about = {"order": record.orders[-1], **to_mapping(evaluation)}
        self._storage.set_trial_user_attr(trial_id, f"rung:{evaluation.rung}", about)
        if record.state == "paused":
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
            return
        known = self._storage.get_trial_system_attrs(trial_id)
        for name, amount in self._excess(record, evaluation).items():
            key = f"constraints:{name}"
            if key not in known:  # computed ones were written by `begin`
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
    just_measured: bool = False,
) -> Store:
    """Create a study or continue it. Raises StudyError, listing the differences, when it exists with other settings.

    As long as no evaluation is complete, settings in MAY_MEND may differ too. Then the search starts over: the trials
    so far are ignored, and the study attribute "first" holds the number of the first trial that counts.

    on_wait: see `Patience`. just_measured: this driver has measured the profile of the device. If another driver began
    the study meanwhile, its profile is taken: `config` of the returned store has it.
    """
    storage, file = open_storage(url, writing=True), file_of(url)
    directions = [optuna.study.StudyDirection[f"{objective.goal}".upper()] for objective in config.objectives]
    with quiet_optuna(), storage_errors(file):
        try:
            study_id = storage.create_new_study(directions, config.name)
        except optuna.exceptions.DuplicatedStudyError:
            study_id = storage.get_study_id_from_name(config.name)
        attributes = storage.get_study_user_attrs(study_id)
        has_trials = "config" not in attributes and storage.get_n_trials(study_id) > 0
        if has_trials:  # perhaps another driver has begun the study since the attributes were read
            attributes = storage.get_study_user_attrs(study_id)
        if "config" in attributes:
            config = _with_profile_of(attributes["config"], config) if just_measured else config
            trials, _ = read_trials(storage, study_id)
            may_mend = not _is_under_way(candidates_of(trials, first_number(attributes)), alone)
            if refuse_other_settings(config, attributes["config"], may_mend):
                storage.set_study_user_attr(study_id, "starts", None)
                storage.set_study_user_attr(study_id, "first", storage.get_n_trials(study_id))
            if attributes["config"] != to_mapping(config):
                storage.set_study_user_attr(study_id, "config", to_mapping(config))
        elif has_trials:
            raise StudyError(
                f"study {config.name!r} in {shown(url)}: it has trials but was not made by prunesearch. "
                f"Possible: a new name. Change name in the study file."
            )
        else:
            _describe(storage, study_id, config)
    store = Store(storage, study_id, config, owner, alone, Patience(on_wait=on_wait, file=file), url)
    if "config" not in attributes:
        stored = store.agree("config", to_mapping(config))  # last: it marks the study as complete
        store.config = _with_profile_of(stored, config) if just_measured else config
        try:
            refuse_other_settings(store.config, stored, may_mend=False)
        except StudyError:
            store.close()
            raise
    return store


def _with_profile_of(saved: Mapping[str, Any], config: StudyConfig) -> StudyConfig:
    """The settings with the profile of the stored ones."""
    stored = from_mapping(StudyConfig, saved, f"study {config.name!r}").device
    if config.device is None or stored is None:
        return config
    return replace(config, device=replace(config.device, table=stored.table))


def _is_result_of(stored: object, task: str) -> bool:
    """True if a stored value can be read as a confirmation and is of this task."""
    is_of_it = isinstance(stored, dict) and stored.get("uid") == task
    return is_of_it and as_said(Evaluation, stored, f"confirmation {task}") is not None


def _claim_from(stored: object, task: str) -> Claim | None:
    """A stored claim; None when it cannot be read, or is of no driver."""
    claim = as_said(Claim, stored, f"claim {task}")
    return claim if claim is not None and is_driver_name(claim.owner) else None


def _is_under_way(trials: list[FrozenTrial], alone: bool) -> bool:
    """Whether any evaluation is complete, or another driver may be running one now."""
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
    """A value that changes when a trial changes."""
    about = trial.user_attrs
    return trial.state, about.get("attempts"), about.get("owner"), rung_keys(trial)
