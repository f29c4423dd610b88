"""Sampler `token_gp`: a Gaussian process over what a schedule does to the tokens, and not over how the space spells it.

Two schedules whose blocks see almost as many tokens cost and lose almost the same, however their stages are placed; a
model of the parameters has to learn that from results, this one begins with it. Objectives that arithmetic gives are
not modelled. What is asked next is the candidate of a pool, half of it neighbours of the front, whose optimistic
prediction adds the most hypervolume to the predicted front of what was evaluated (an upper confidence bound by
hypervolume, as in SMS-EGO, Ponweiser et al. 2008), times the probability that it is within the measured limits
(Gardner et al. 2014). The front is the predicted one because the measured one is made of lucky trainings.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction import DictVectorizer
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.preprocessing import StandardScaler

from prunesearch.config import ModelConfig, StudyConfig
from prunesearch.evaluate import METRICS
from prunesearch.front import hypervolume, nondominated_ranks
from prunesearch.schedule import Schedule, resolve
from prunesearch.shape import ModelShape
from prunesearch.space.choices import Value, anything, blocks_of, dimensions, mutated

POOL = 150
FEWEST = 8
"""Results before the model is asked."""
GROWTH = 1.5
"""The hyperparameters are fitted anew whenever there are so many times as many results."""
MOST_FITTED = 256
"""Results that the hyperparameters are fitted to; all others count for the predictions only."""
WINDOW = 400
"""Results that predictions are made from: those that are not dominated, and the last ones."""
OPTIMISM = (1.0, 2.0, 4.0)
"""Standard deviations; drawn anew for each question, as one that is always bold or never is stuck sooner. More of them
when no candidate seems to improve the front."""
REMEMBERED = 4 * WINDOW
LIMIT = "limit "
BEYOND = 0.1
"""The reference point of the hypervolume is so far beyond the front's extent."""


def features(schedule: Schedule, shape: ModelShape) -> dict[str, float]:
    """What a schedule does to the tokens, by name: the share that is there after each block, how much each verb, score
    and place removes (in nats), the logarithm of each threshold, and the target of thresholds."""
    found: dict[str, float] = {}
    present = [1.0] * shape.depth
    for step in resolve(schedule, shape):
        stage = step.stage
        present[stage.block :] = [step.after / shape.patch_tokens] * (shape.depth - stage.block)
        amount = math.log(step.before / step.after)
        if stage.threshold is not None:
            # cosines may be negative; down there nothing more is kept or merged, so that a straight line will do
            amount = -math.log(max(stage.threshold, 1e-9)) - min(stage.threshold, 0.0)
            found[f"threshold {stage.block} {stage.reduce}"] = amount
        for word in (f"reduce {stage.reduce}", f"score {stage.score}", f"at {stage.at}"):
            found[word] = found.get(word, 0.0) + amount
    found |= {f"after {block}": share for block, share in enumerate(present)}
    if schedule.target_gmacs is not None:
        found["target"] = schedule.target_gmacs
    return found


@dataclass(frozen=True)
class _Candidate:
    parameters: dict[str, Value]
    schedule: Schedule


@dataclass(frozen=True)
class _Result(_Candidate):
    """What was measured of a candidate. losses: objectives, minimized. excess: by measured limit, 0 is within it."""

    losses: tuple[float, ...]
    excess: Mapping[str, float]


@dataclass(frozen=True)
class _Forecast:
    """mean, deviation: (schedules, objectives), of losses without noise. likely: (schedules,), to be within limits."""

    mean: np.ndarray
    deviation: np.ndarray
    likely: np.ndarray


class TokenModel:
    """What the sampler knows, with the questions of `samplers.ModelStudy`.

    build: uid and schedule of the candidate that parameters stand for; None when they stand for none. seen: uids of
    candidates, that need not be proposed again.
    """

    def __init__(
        self,
        config: StudyConfig,
        shape: ModelShape,
        build: Callable[[Mapping[str, Value]], tuple[str, Schedule] | None],
        seen: Container[str],
    ) -> None:
        self._config, self._shape, self._build, self._seen = config, shape, build, seen
        self._space = dimensions(config.space)
        self._signs = [1.0 if one.goal == "minimize" else -1.0 for one in config.objectives]
        self._running: dict[str, _Candidate] = {}
        self._results: dict[str, _Result] = {}
        self._kernels: dict[tuple[str, int], Any] = {}
        self._objectives = [one.metric for one in config.objectives]
        adaptive = any("threshold" in block.amount for block in blocks_of(config.space))  # costs are measured then
        names = [*self._objectives, *(LIMIT + name for name, _ in config.limits)]
        self._modelled = [name for name in names if adaptive or not METRICS[name.removeprefix(LIMIT)].computed]
        self._computed = lru_cache(REMEMBERED)(partial(_computed, config.model))
        self._features = lru_cache(REMEMBERED)(partial(features, shape=shape))

    def add(self, uid: str, parameters: Mapping[str, Value]) -> None:
        """A candidate that runs now."""
        built = self._build(parameters)
        if built is not None:
            self._running[uid] = _Candidate(dict(parameters), built[1])

    def tell(self, uid: str, values: Sequence[float] | None, excess: Mapping[str, float]) -> None:
        """The result of a candidate: None when it failed. `excess` above 0 breaks a limit. Others are ignored."""
        candidate = self._running.pop(uid, None)
        if candidate is not None and values is not None:
            losses = tuple(sign * value for sign, value in zip(self._signs, values, strict=True))
            self._results[uid] = _Result(candidate.parameters, candidate.schedule, losses, dict(excess))

    def draw(self, seed: int) -> dict[str, Value]:
        """One proposal that is no candidate yet; anything at random while there are too few results."""
        generator = random.Random(seed)
        results = self._window()
        if len(results) < FEWEST:
            return anything(self._space, generator)
        models = self._fitted(results)
        known = self._forecast(models, [one.schedule for one in results])
        within = np.flatnonzero(known.likely >= 0.5)
        if len(within) == 0:
            within = np.flatnonzero(known.likely == known.likely.max())
        front = within[nondominated_ranks(known.mean[within]) == 0]
        pool = self._pool([results[index] for index in front], generator)
        if not pool:
            return anything(self._space, generator)
        believed = known.mean[front]
        if self._running:
            pending = [one.schedule for one in self._running.values()]
            believed = np.concatenate([believed, self._forecast(models, pending).mean])
        extent = np.ptp(known.mean[front], axis=0)
        extent = np.where(extent > 0, extent, np.maximum(np.ptp(known.mean, axis=0), 1e-9))
        low = known.mean[front].min(axis=0)
        new = self._forecast(models, [one.schedule for one in pool])
        for optimism in OPTIMISM[generator.randrange(len(OPTIMISM)) :]:
            gains = _gains((new.mean - optimism * new.deviation - low) / extent, (believed - low) / extent)
            if (gains > 0).any():
                return pool[int(np.argmax(gains * new.likely))].parameters
        return generator.choice(pool).parameters

    def _window(self) -> list[_Result]:
        results = list(self._results.values())
        if len(results) <= WINDOW:
            return results
        best = nondominated_ranks(np.array([one.losses for one in results])) == 0
        first = len(results) - max(WINDOW - int(best.sum()), WINDOW // 2)
        return [one for index, one in enumerate(results) if best[index] or index >= first]

    def _pool(self, front: Sequence[_Result], generator: random.Random) -> list[_Candidate]:
        found: dict[str, _Candidate] = {}
        for index in range(POOL):
            if index % 2 == 0:
                parameters = mutated(generator.choice(front).parameters, self._space, generator)
            else:
                parameters = anything(self._space, generator)
            built = self._build(parameters)
            if built is not None and built[0] not in self._seen:
                found[built[0]] = _Candidate(parameters, built[1])
        return list(found.values())

    # --- the regressions ---

    def _fitted(self, results: Sequence[_Result]) -> dict[str, Regression]:
        """One for each objective that arithmetic does not give and for each measured limit, by metric."""
        milestone = FEWEST
        while GROWTH * milestone <= min(len(self._results), WINDOW):
            milestone = math.ceil(GROWTH * milestone)
        first = list(self._results.values())[:milestone]  # always the same, also for a search that is continued
        rows, models = [self._features(one.schedule) for one in results], {}
        for name in self._modelled:
            if (name, milestone) not in self._kernels:
                inputs = [self._features(one.schedule) for one in first]
                self._kernels[name, milestone] = fitted_kernel(inputs, [self._target(one, name) for one in first])
            targets = [self._target(one, name) for one in results]
            models[name] = Regression(rows, targets, self._kernels[name, milestone])
        return models

    def _target(self, result: _Result, name: str) -> float:
        if name.startswith(LIMIT):
            return result.excess.get(name.removeprefix(LIMIT), 0.0)
        return result.losses[self._objectives.index(name)]

    def _forecast(self, models: Mapping[str, Regression], schedules: Sequence[Schedule]) -> _Forecast:
        rows = [self._features(schedule) for schedule in schedules]
        mean, deviation = np.zeros((2, len(schedules), len(self._signs)))
        for column, (name, sign) in enumerate(zip(self._objectives, self._signs, strict=True)):
            if name in models:
                mean[:, column], deviation[:, column] = models[name].predict(rows)
            else:
                mean[:, column] = [sign * self._computed(name, schedule) for schedule in schedules]
        likely = np.ones(len(schedules))
        for name, model in models.items():
            if name.startswith(LIMIT):
                excess, unsure = model.predict(rows)
                likely *= norm.cdf(-excess / unsure)
        return _Forecast(mean, deviation, likely)


class Regression:
    """A Gaussian process on features, with a kernel whose hyperparameters are given."""

    def __init__(self, rows: Sequence[Mapping[str, float]], values: Sequence[float], kernel: Any) -> None:
        self._columns, self._scale = DictVectorizer(sparse=False), StandardScaler()
        inputs = self._scale.fit_transform(self._columns.fit_transform(rows))
        targets = _without_outliers(values)
        self._process = GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True).fit(inputs, targets)
        self._noise = kernel.k2.noise_level * np.square(np.std(targets))

    def predict(self, rows: Sequence[Mapping[str, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations of the mean of many evaluations."""
        inputs = self._scale.transform(self._columns.transform(rows))
        mean, deviation = self._process.predict(inputs, return_std=True)
        return mean, np.sqrt(np.maximum(np.square(deviation) - self._noise, 1e-12))


def _computed(model: ModelConfig, metric: str, schedule: Schedule) -> float:
    compute = METRICS[metric].compute
    value = None if compute is None else compute(model, schedule)
    assert value is not None, "only thresholds make a cost depend on the images"
    return value


def fitted_kernel(rows: Sequence[Mapping[str, float]], values: Sequence[float]) -> Any:
    """Smooth functions with noise, by maximum likelihood on at most MOST_FITTED results."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_FITTED)).astype(int))
    inputs = DictVectorizer(sparse=False).fit_transform([rows[index] for index in chosen])
    kernel = ConstantKernel(1.0) * RBF(5.0, (3.0, 1e3)) + WhiteKernel(0.5, (1e-2, 1e1))
    process = GaussianProcessRegressor(kernel, normalize_y=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a bound is an answer too
        process.fit(StandardScaler().fit_transform(inputs), _without_outliers([values[index] for index in chosen]))
    return process.kernel_


def _without_outliers(values: Sequence[float]) -> np.ndarray:
    """Trainings that went wrong count as bad ones: how bad would hide every other difference."""
    found = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(found, (25, 75))
    return np.minimum(found, high + 3 * (high - low)) if high > low else found


def _gains(hoped: np.ndarray, believed: np.ndarray) -> np.ndarray:
    """(n, objectives), (front, objectives), both in units of the front's extent -> (n,) of hypervolume added."""
    reference = np.full(believed.shape[1], 1.0 + BEYOND)
    base = hypervolume(believed, reference)
    return np.array([hypervolume(np.vstack([believed, point]), reference) for point in hoped]) - base
