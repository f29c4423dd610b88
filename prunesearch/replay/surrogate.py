"""A regression of a table: predicts what schedules would have given that were not measured.

It predicts each metric at each budget, transformed: percentages by the logit, others by the logarithm. Its inputs are
what a schedule does to the tokens (how many are present in each block, how many are removed there, the verbs and the
scores) and the products of these. GMACs are computed and exact.

Its residuals are taken for the noise of training. `Surrogate.measured` adds the residuals of one measured schedule,
drawn by uid, at all budgets. So an invented evaluation scatters like a measured one, and luck at the first budget is
correlated with luck at the next as in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from prunesearch.cost import estimate_cost
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import METRICS
from prunesearch.replay.table import Recorded, Table
from prunesearch.samplers.propose import seed_of
from prunesearch.schedule import Schedule, resolve
from prunesearch.search.agreement import kendall_tau
from prunesearch.shape import ModelShape
from prunesearch.space.choices import uid_of

FOLDS = 5
SECONDS = "seconds"
SMALLEST = 2e-3
"""Shares are clipped to this distance from 0 and 1, so that their logit is finite."""


@dataclass(frozen=True)
class FitError:
    """How well one quantity is predicted at one budget, for schedules that the regression was not fitted to.

    mae: mean absolute error in the quantity's own unit. r2: of the transformed quantity. tau: Kendall's, over all
    schedules. tau_best: Kendall's, over the best third by measurement, among which a search has to choose.
    """

    name: str
    images: int
    mae: float
    r2: float
    tau: float
    tau_best: float


class Surrogate:
    """Evaluations of schedules with the verbs and scores of a table, in the table or not."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._words = _words(list(table.schedules.values()))
        self._names = [*(name for name in table.metrics if name != "gmacs"), SECONDS]
        rows = np.array([_features(one, table.shape, self._words) for one in table.schedules.values()])
        targets = _targets(table, self._names)
        self._regression = _regression().fit(rows, targets)
        self._predicted = cross_val_predict(_regression(), rows, targets, cv=KFold(FOLDS, shuffle=True, random_state=0))
        self._residuals = targets - self._predicted
        self._known: dict[Schedule, tuple[str, np.ndarray]] = {}

    def expected(self, schedule: Schedule, rung: int) -> Recorded:
        """The mean of many evaluations of a schedule at a rung of the table.

        Raises ScheduleError for a verb or a score that the table does not have.
        """
        return self._as_measured(schedule, rung, self._seen(schedule)[1])

    def measured(self, schedule: Schedule, rung: int) -> Recorded:
        """What the table has for a schedule. For a schedule that it lacks, one invented evaluation with noise, always
        the same one. Raises ScheduleError as `expected`."""
        uid, transformed = self._seen(schedule)
        if uid in self.table.rows:
            return self.table.rows[uid][rung]
        luck = self._residuals[seed_of("luck", uid) % len(self._residuals)]
        return self._as_measured(schedule, rung, transformed + luck)

    def errors(self) -> list[FitError]:
        """Errors of each metric and of the seconds at each budget, by cross validation with FOLDS folds."""
        targets, found = _targets(self.table, self._names), []
        for column, (images, name) in enumerate((i, name) for i in self.table.images for name in self._names):
            true, predicted = targets[:, column], self._predicted[:, column]
            mae = np.abs(_back(true, name) - _back(predicted, name)).mean()
            r2 = 1 - np.square(true - predicted).mean() / max(true.var(), 1e-12)
            is_best_high = name != SECONDS and METRICS[name].goal == "maximize"
            best = np.argsort(-true if is_best_high else true, kind="stable")[: max(len(true) // 3, 1)]
            tau, tau_best = (_tau(true[which], predicted[which]) for which in (np.arange(len(true)), best))
            found.append(FitError(name, images, float(mae), float(r2), tau, tau_best))
        return found

    def _seen(self, schedule: Schedule) -> tuple[str, np.ndarray]:
        """The uid of a schedule, and its predicted means at all budgets, transformed."""
        if schedule not in self._known:
            row = _features(schedule, self.table.shape, self._words)
            self._known[schedule] = uid_of(schedule, self.table.shape), self._regression.predict(row[None])[0]
        return self._known[schedule]

    def _as_measured(self, schedule: Schedule, rung: int, transformed: np.ndarray) -> Recorded:
        of_rung = transformed.reshape(len(self.table.images), len(self._names))[rung]
        values = {name: float(_back(value, name)) for name, value in zip(self._names, of_rung, strict=True)}
        seconds = values.pop(SECONDS)
        values["gmacs"] = estimate_cost(self.table.shape, schedule).gmacs
        return Recorded({name: values[name] for name in self.table.metrics}, seconds)


def _regression() -> Pipeline:
    ridge = RidgeCV(np.logspace(-2, 5, 15), alpha_per_target=True)
    return make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler(), ridge)


# --- inputs of the regression --------------------------------------------------------------------------------------


def _words(schedules: Sequence[Schedule]) -> list[str]:
    stages = [stage for schedule in schedules for stage in schedule.stages]
    return sorted({f"reduce {stage.reduce}" for stage in stages} | {f"score {stage.score}" for stage in stages})


def _features(schedule: Schedule, shape: ModelShape, words: Sequence[str]) -> np.ndarray:
    """For each block the share of tokens present after it, and the logarithm of the share that stays of those before
    it; for each verb and score 1 when a stage has it.

    `token_gp.features` differs: each verb and score counts by how much it removes, and blocks have no second number.
    """
    present, stays = np.ones(shape.depth), np.zeros(shape.depth)
    has = dict.fromkeys(words, 0.0)
    for step in resolve(schedule, shape):
        present[step.stage.block : step.until] = step.after / shape.patch_tokens
        stays[step.stage.block] += np.log(step.after / step.before)
        for word in (f"reduce {step.stage.reduce}", f"score {step.stage.score}"):
            if word not in has:
                raise ScheduleError(
                    "schedule",
                    [f"the table that is replayed has no {word}. Possible: {', '.join(words)}. Choose one of those."],
                )
            has[word] = 1.0
    return np.concatenate([present, stays, list(has.values())])


# --- targets of the regression -----------------------------------------------------------------------------------


def _targets(table: Table, names: Sequence[str]) -> np.ndarray:
    """(schedules, budgets x names), transformed."""
    return np.array(
        [
            [_forth(one.seconds if name == SECONDS else one.metrics[name], name) for one in row for name in names]
            for row in table.rows.values()
        ]
    )


def _is_share(name: str) -> bool:
    return name != SECONDS and METRICS[name].unit == "%"


def _forth(value: float, name: str) -> float:
    if _is_share(name):
        return float(logit(np.clip(value / 100, SMALLEST, 1 - SMALLEST)))
    return float(np.log(max(value, 1e-9)))


def _back(value: Any, name: str) -> Any:
    return 100 * expit(value) if _is_share(name) else np.exp(value)


def _tau(true: np.ndarray, predicted: np.ndarray) -> float:
    tau = kendall_tau(list(zip(true, predicted, strict=True)))
    return float("nan") if tau is None else tau
