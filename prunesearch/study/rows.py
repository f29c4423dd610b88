"""SQL on Optuna's tables, for changes that must check and write in one transaction: claims and results.

Every function gets a connection inside a transaction. Lock the row of a trial (`lock_trial`) before you change it, so
that only one of several drivers changes it at a time. The tables are those of Optuna's RDBStorage, whose own
compare-and-swap covers the state of a trial only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import sqlalchemy as sql

_meta = sql.MetaData()
_STATES = sql.Enum("RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING", name="trialstate")
_STUDIES = sql.Table("studies", _meta, sql.Column("study_id", sql.Integer, primary_key=True))
_STUDY_ATTRIBUTES = sql.Table(
    "study_user_attributes",
    _meta,
    sql.Column("study_user_attribute_id", sql.Integer, primary_key=True),
    sql.Column("study_id", sql.Integer),
    sql.Column("key", sql.String),
    sql.Column("value_json", sql.Text),
)
_TRIALS = sql.Table(
    "trials",
    _meta,
    sql.Column("trial_id", sql.Integer, primary_key=True),
    sql.Column("number", sql.Integer),
    sql.Column("study_id", sql.Integer),
    sql.Column("state", _STATES),
    sql.Column("datetime_start", sql.DateTime),
    sql.Column("datetime_complete", sql.DateTime),
)
_VALUES = sql.Table(
    "trial_values",
    _meta,
    sql.Column("trial_value_id", sql.Integer, primary_key=True),
    sql.Column("trial_id", sql.Integer),
    sql.Column("objective", sql.Integer),
    sql.Column("value", sql.Float(precision=53)),
    sql.Column("value_type", sql.Enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")),
)
_PARAMETERS = sql.Table(
    "trial_params",
    _meta,
    sql.Column("param_id", sql.Integer, primary_key=True),
    sql.Column("trial_id", sql.Integer),
    sql.Column("param_name", sql.String),
    sql.Column("param_value", sql.Float(precision=53)),
    sql.Column("distribution_json", sql.Text),
)


def _trial_attributes(whose: str) -> sql.Table:
    return sql.Table(
        f"trial_{whose}_attributes",
        _meta,
        sql.Column(f"trial_{whose}_attribute_id", sql.Integer, primary_key=True),
        sql.Column("trial_id", sql.Integer),
        sql.Column("key", sql.String),
        sql.Column("value_json", sql.Text),
    )


_USER, _SYSTEM = _trial_attributes("user"), _trial_attributes("system")


class Missing(Exception):
    """A row that this driver wrote or read before is gone."""


@dataclass(frozen=True)
class Trial:
    """A trial whose row is locked until the end of the transaction. texts: its user attributes, name -> JSON."""

    trial_id: int
    state: str
    texts: Mapping[str, str]

    @cached_property
    def attempts(self) -> list[int]:
        """How often each rung was begun, lowest rung first."""
        return list(json.loads(self.texts["attempts"]))

    @cached_property
    def owner(self) -> str:
        return str(json.loads(self.texts.get("owner", '""')))

    @property
    def rung(self) -> int:
        """The rung that was begun last."""
        return len(self.attempts) - 1

    def has(self, rung: int) -> bool:
        """Whether the evaluation of a rung is stored."""
        return f"rung:{rung}" in self.texts


def lock_trial(connection: sql.Connection, trial_id: int) -> Trial:
    """Read a trial and lock its row. Raises Missing."""
    query = sql.select(_TRIALS.c.state).where(_TRIALS.c.trial_id == trial_id).with_for_update()
    row = connection.execute(query).first()
    texts = sql.select(_USER.c.key, _USER.c.value_json).where(_USER.c.trial_id == trial_id)
    found: dict[str, str] = {row.key: row.value_json for row in connection.execute(texts)}
    if row is None or "attempts" not in found:
        raise Missing(f"trial {trial_id} is not there any more")
    return Trial(trial_id, row.state, found)


def change_trial(
    connection: sql.Connection,
    trial: Trial,
    *,
    state: str | None = None,
    attributes: Mapping[str, Any] | None = None,
    constraints: Mapping[str, float] | None = None,
    values: Iterable[float] = (),
) -> None:
    """Write to a locked trial. constraints: existing ones are not overwritten."""
    for key, value in (attributes or {}).items():
        _set(connection, _USER, {"trial_id": trial.trial_id}, key, json.dumps(value), key in trial.texts)
    if constraints:
        query = sql.select(_SYSTEM.c.key).where(_SYSTEM.c.trial_id == trial.trial_id)
        known = set(connection.execute(query).scalars())
        for name, amount in constraints.items():
            if f"constraints:{name}" not in known:
                _set(connection, _SYSTEM, {"trial_id": trial.trial_id}, f"constraints:{name}", json.dumps(amount))
    for objective, value in enumerate(values):
        row = {"trial_id": trial.trial_id, "objective": objective, "value": value, "value_type": "FINITE"}
        connection.execute(sql.insert(_VALUES).values(row))
    if state is not None:
        changes: dict[str, Any] = {"state": state}
        if state == "RUNNING":
            changes["datetime_start"] = _now()
        elif state != "WAITING":
            changes["datetime_complete"] = _now()
        connection.execute(sql.update(_TRIALS).where(_TRIALS.c.trial_id == trial.trial_id).values(changes))


def create_trial(
    connection: sql.Connection,
    study_id: int,
    parameters: Mapping[str, tuple[float, str]],
    attributes: Mapping[str, Any],
    constraints: Mapping[str, float],
) -> tuple[int, int]:
    """Insert a running trial into a locked study; returns its id and number.

    parameters: name -> (Optuna's internal value, distribution as JSON).
    """
    of_study = sql.select(sql.func.count()).select_from(_TRIALS).where(_TRIALS.c.study_id == study_id)
    number = int(connection.execute(of_study).scalar_one())
    trial = {"study_id": study_id, "number": number, "state": "RUNNING", "datetime_start": _now()}
    key = connection.execute(sql.insert(_TRIALS).values(trial)).inserted_primary_key
    assert key is not None, "SQLAlchemy knows it of every single row that it inserts"
    trial_id = int(key[0])
    rows: list[tuple[sql.Table, list[dict[str, Any]]]] = [
        (
            _PARAMETERS,
            [
                {"trial_id": trial_id, "param_name": name, "param_value": value, "distribution_json": distribution}
                for name, (value, distribution) in parameters.items()
            ],
        ),
        (
            _USER,
            [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()],
        ),
        (
            _SYSTEM,
            [
                {"trial_id": trial_id, "key": f"constraints:{name}", "value_json": json.dumps(amount)}
                for name, amount in constraints.items()
            ],
        ),
    ]
    for table, several in rows:
        if several:
            connection.execute(sql.insert(table), several)
    return trial_id, number


def lock_study(connection: sql.Connection, study_id: int) -> None:
    """Lock the row of a study: no other driver can create trials or claim confirmations. Raises Missing."""
    query = sql.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id).with_for_update()
    if connection.execute(query).first() is None:
        raise Missing("the study is not there any more")


def candidates_with(
    connection: sql.Connection, study_id: int, uid: str, first: int, without: Collection[int]
) -> tuple[list[tuple[int, int]], int]:
    """(id, number) of the candidates with a uid, and the number of all candidates of the study.

    Trials below the number `first` and those with a number in `without` are no candidates.
    """
    counts = (_TRIALS.c.study_id == study_id) & (_TRIALS.c.number >= first) & _TRIALS.c.number.not_in(without)
    joined = sql.join(_TRIALS, _USER, _TRIALS.c.trial_id == _USER.c.trial_id)
    is_void = _USER.c.key == "void"  # earlier versions marked duplicates like this
    is_same = (_USER.c.key == "uid") & (_USER.c.value_json == json.dumps(uid))
    query = (
        sql.select(_TRIALS.c.trial_id, _TRIALS.c.number, _USER.c.key)
        .select_from(joined)
        .where(counts & (is_void | is_same))
    )
    found = connection.execute(query).all()
    void = {row.trial_id for row in found if row.key == "void"}
    total = sql.select(sql.func.count()).select_from(_TRIALS).where(counts)
    same = sorted((row.trial_id, row.number) for row in found if row.key == "uid" and row.trial_id not in void)
    return same, int(connection.execute(total).scalar_one()) - len(void)


def trial_numbers(connection: sql.Connection, study_id: int) -> list[tuple[int, int]]:
    """(id, number) of all trials of a study, by number."""
    query = sql.select(_TRIALS.c.trial_id, _TRIALS.c.number).where(_TRIALS.c.study_id == study_id)
    return [(row.trial_id, row.number) for row in connection.execute(query.order_by(_TRIALS.c.number))]


def holds(connection: sql.Connection, trial_id: int, rung: int) -> bool:
    """Whether the database has the evaluation of a rung."""
    query = sql.select(_USER.c.key).where((_USER.c.trial_id == trial_id) & (_USER.c.key == f"rung:{rung}"))
    return connection.execute(query).first() is not None


# --- attributes of the study ---


def study_attribute(connection: sql.Connection, study_id: int, key: str) -> Any:
    """The value of an attribute of a study; None when it is not there."""
    text = connection.execute(sql.select(_STUDY_ATTRIBUTES.c.value_json).where(_of_study(study_id, key))).scalar()
    return None if text is None else json.loads(text)


def set_study_attribute(connection: sql.Connection, study_id: int, key: str, value: Any) -> None:
    """Write an attribute of a locked study."""
    row = sql.select(_STUDY_ATTRIBUTES.c.study_id).where(_of_study(study_id, key))
    is_there = connection.execute(row).first() is not None
    _set(connection, _STUDY_ATTRIBUTES, {"study_id": study_id}, key, json.dumps(value), is_there)


def delete_study_attribute(connection: sql.Connection, study_id: int, key: str) -> None:
    """Delete an attribute of a study, if it is there."""
    connection.execute(sql.delete(_STUDY_ATTRIBUTES).where(_of_study(study_id, key)))


def swap_study_attribute(
    connection: sql.Connection, study_id: int, key: str, before: Iterable[Any], after: Any
) -> bool:
    """Replace an attribute by `after` if its value is one of `before`; returns whether it was."""
    is_before = _STUDY_ATTRIBUTES.c.value_json.in_([json.dumps(value) for value in before])
    change = sql.update(_STUDY_ATTRIBUTES).where(_of_study(study_id, key) & is_before)
    return connection.execute(change.values(value_json=json.dumps(after))).rowcount == 1


def _of_study(study_id: int, key: str) -> sql.ColumnElement[bool]:
    return (_STUDY_ATTRIBUTES.c.study_id == study_id) & (_STUDY_ATTRIBUTES.c.key == key)


def _set(
    connection: sql.Connection, table: sql.Table, of: Mapping[str, int], key: str, text: str, is_there: bool = False
) -> None:
    if not is_there:
        connection.execute(sql.insert(table).values({**of, "key": key, "value_json": text}))
        return
    ((column, number),) = of.items()
    rows = (table.c[column] == number) & (table.c.key == key)
    connection.execute(sql.update(table).where(rows).values(value_json=text))


def _now() -> datetime:
    """UTC without a time zone, as Optuna stores times."""
    return datetime.now(timezone.utc).replace(tzinfo=None)
