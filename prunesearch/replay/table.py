"""Recorded evaluations: a table of schedules, each measured at several budgets, on which searches are replayed.

A table is a CSV file that `scripts/record_table.py` writes. Columns: uid, rung, images, one for each metric, seconds
(of this rung alone: training since the rung before, and measurement) and schedule (its stages as JSON).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prunesearch.errors import FileError
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape
from prunesearch.space.choices import uid_of
from prunesearch.strict import from_mapping

_NOT_METRICS = ("uid", "rung", "images", "seconds", "schedule")


@dataclass(frozen=True)
class Recorded:
    """What one evaluation gave, by metric, and how long it took."""

    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Table:
    """Schedules, each measured at all budgets.

    images: the budgets, ascending. metrics: their names. schedules, rows: by uid. A row has one entry for each budget;
    each training continues the one of the budget before.
    """

    shape: ModelShape
    images: tuple[int, ...]
    metrics: tuple[str, ...]
    schedules: Mapping[str, Schedule]
    rows: Mapping[str, tuple[Recorded, ...]]

    def lookup(self, schedule: Schedule, rung: int) -> Recorded | None:
        """What was measured of a schedule, or of an equivalent one, at a rung of the table; None if it is not there."""
        row = self.rows.get(uid_of(schedule, self.shape))
        return None if row is None else row[rung]


def read_table(path: Path, shape: ModelShape) -> Table:
    """Read a table that was measured on a model of this shape. Schedules that lack a budget are left out.

    Raises FileError for a file that is no such table.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        missing = [name for name in _NOT_METRICS if name not in columns]
        if missing:
            raise FileError(
                str(path),
                [
                    f"it has no column {', '.join(missing)}, but {', '.join(columns) or 'nothing'}. "
                    f"Possible: a table that scripts/record_table.py wrote. Make one."
                ],
            )
        lines = list(reader)
    metrics = tuple(name for name in columns if name not in _NOT_METRICS)
    images = tuple(sorted({int(line["images"]) for line in lines}))
    schedules: dict[str, Schedule] = {}
    found: dict[str, dict[int, Recorded]] = {}
    for number, line in enumerate(lines, start=2):
        uid = line["uid"]
        values = {name: float(line[name]) for name in metrics}
        found.setdefault(uid, {})[int(line["images"])] = Recorded(values, float(line["seconds"]))
        if uid not in schedules:
            stages = {"stages": json.loads(line["schedule"])}
            schedules[uid] = from_mapping(Schedule, stages, f"{path}, line {number}")
    rows = {uid: tuple(row[count] for count in images) for uid, row in found.items() if len(row) == len(images)}
    return Table(shape, images, metrics, {uid: schedules[uid] for uid in rows}, rows)
