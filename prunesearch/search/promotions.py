"""Promotions of a study: keeps the results by rung and asks `rungs.py` which candidate is promoted."""

from __future__ import annotations

from collections.abc import Iterable

from prunesearch.config import StudyConfig
from prunesearch.evaluate.limits import total_excess
from prunesearch.record import Record, cost_of
from prunesearch.relative_limits import dense_record, limits_at
from prunesearch.search.rungs import Result, promotion


class Promotions:
    """The results of a study by rung. Call `add` for each new or changed record.

    Limits may be relative to the dense model. When it has a new result, make a new object from all records.
    """

    def __init__(self, config: StudyConfig, records: Iterable[Record] = ()) -> None:
        self._config = config
        names, cost = [objective.metric for objective in config.objectives], cost_of(config.objectives)
        self._cost = None if cost is None else names.index(cost)
        self._results: list[dict[str, Result]] = [{} for _ in config.rungs]
        self._settled: set[int] = set()  # rungs without a promotion until a result changes
        records = list(records)
        dense = dense_record(records)
        self._limits = [limits_at(config, dense, rung) for rung in range(len(config.rungs))]
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Add a new or changed record."""
        for evaluation in record.evaluations:
            if evaluation.status != "complete":
                continue
            values, objectives = dict(evaluation.metrics), self._config.objectives
            result = Result(
                record.uid,
                evaluation.rung,
                tuple(values[one.metric] * (1 if one.goal == "minimize" else -1) for one in objectives),
                total_excess(self._limits[evaluation.rung], values),
                record.is_start,
                is_promoted=record.rung > evaluation.rung,
            )
            if self._results[evaluation.rung].get(record.uid) != result:
                self._results[evaluation.rung][record.uid] = result
                self._settled.discard(evaluation.rung)

    def next(self) -> Result | None:
        """The result whose candidate is promoted now, highest rung first; None if there is none."""
        for rung in reversed(range(len(self._results) - 1)):
            if rung not in self._settled:
                found = promotion(list(self._results[rung].values()), self._config.promote, self._cost)
                if found is not None:
                    return found
                self._settled.add(rung)
        return None
