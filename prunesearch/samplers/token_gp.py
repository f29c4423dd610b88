"""Sampler `token_gp`: a Gaussian process over what a schedule does to the tokens, instead of the space's parameters.

Two schedules whose blocks see almost as many tokens cost and lose almost the same, however their stages are placed. A
model of the parameters has to learn that from results; this one begins with it. Objectives that arithmetic gives are
computed and not modelled.

A proposal is the best of a pool of candidates, half of them neighbours of the front. The best is the one whose
optimistic prediction adds the most hypervolume to the predicted front (an upper confidence bound by hypervolume, as in
SMS-EGO, Ponweiser et al. 2008), times the probability that it is within the measured limits (Gardner et al. 2014). The
front is made of predictions and not of measurements, because the best measurements are partly luck.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
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

from prunesearch.config import Target
from prunesearch.evaluate import METRICS
from prunesearch.front import hypervolume, nondominated_ranks
from prunesearch.samplers.proposer import ProposerSettings
from prunesearch.schedule import Schedule, resolve
from prunesearch.shape import ModelShape
from prunesearch.space.choices import Value, anything, blocks_of, dimensions, mutated

POOL = 150
"""Candidates among which one proposal is chosen."""
FEWEST = 8
"""With fewer results, proposals are random."""
GROWTH = 1.5
"""The hyperparameters are fitted anew each time the number of results has grown by this factor."""
MOST_FITTED = 256
"""Results that the hyperparameters are fitted to, at most."""
WINDOW = 400
"""Results that predictions are made from, at most: those that are not dominated, and the last ones."""
OPTIMISM = (1.0, 2.0, 4.0)
"""Exploration weights of the upper confidence bound, in standard deviations. One is drawn at random per proposal,
because a fixed weight got stuck in local fronts. The next larger one is taken when no candidate seems to improve the
front."""
REMEMBERED = 4 * WINDOW
"""Schedules whose features and computed metrics are kept."""
LIMIT = "limit "
"""Prefix of the name of what is modelled for a limit."""
BEYOND = 0.1
"""Distance from the front's worst values to the reference point of the hypervolume, in units of the front's extent."""


def features(schedule: Schedule, shape: ModelShape) -> dict[str, float]:
    """What a schedule does to the tokens, by name.

    The share of tokens present after each block; how many nats of them each verb, score and place removes; minus the
    logarithm of each threshold; the target of thresholds, if there is one.
    """
    found: dict[str, float] = {}
    present = [1.0] * shape.depth
    for step in resolve(schedule, shape):
        stage = step.stage
        end = shape.depth if step.until is None else step.until
        present[stage.block : end] = [step.after / shape.patch_tokens] * (end - stage.block)
        amount = math.log(step.before / step.after)
        if stage.threshold is not None:
            # a threshold on cosines may be negative, where the logarithm ends; the second term goes on, linearly
            amount = -math.log(max(stage.threshold, 1e-9)) - min(stage.threshold, 0.0)
            found[f"threshold {stage.block} {stage.reduce}"] = amount
        for word in (f"reduce {stage.reduce}", f"score {stage.score}", f"at {stage.at}"):
            found[word] = found.get(word, 0.0) + amount
    found |= {f"after {block}": share for block, share in enumerate(present)}
    if schedule.target is not None:
        found[schedule.target.field] = schedule.target.amount
    return found


@dataclass(frozen=True)
class _Candidate:
    parameters: dict[str, Value]
    schedule: Schedule


@dataclass(frozen=True)
class _Result(_Candidate):
    """What was measured of a candidate. losses: objectives, as numbers to minimize. excess: by limit, as in `tell`."""

    losses: tuple[float, ...]
    excess: Mapping[str, float]


@dataclass(frozen=True)
class _Forecast:
    """mean, deviation: (schedules, objectives), of losses without noise. likely: (schedules,), the probability that all
    limits are kept."""

    mean: np.ndarray
    deviation: np.ndarray
    likely: np.ndarray


class TokenModel:
    """The proposer of this sampler."""

    def __init__(self, settings: ProposerSettings) -> None:
        self._build, self._seen = settings.build, settings.seen
        self._space = dimensions(settings.space)
        self._signs = [1.0 if one.goal == "minimize" else -1.0 for one in settings.objectives]
        self._running: dict[str, _Candidate] = {}
        self._results: dict[str, _Result] = {}
        self._kernels: dict[tuple[str, int], Any] = {}
        self._objectives = [one.metric for one in settings.objectives]
        adaptive = any("threshold" in block.amount for block in blocks_of(settings.space))  # costs are measured then
        names = [*self._objectives, *(LIMIT + name for name, _ in settings.limits)]
        self._modelled = [name for name in names if adaptive or not METRICS[name.removeprefix(LIMIT)].computed]
        self._computed = lru_cache(REMEMBERED)(partial(_computed, settings.target))
        self._features = lru_cache(REMEMBERED)(partial(features, shape=settings.shape))

    def add(self, uid: str, parameters: Mapping[str, Value]) -> None:
        """A candidate runs now."""
        built = self._build(parameters)
        if built is not None:
            self._running[uid] = _Candidate(dict(parameters), built[1])

    def tell(self, uid: str, values: Sequence[float] | None, excess: Mapping[str, float]) -> None:
        """The result of a candidate that runs; None when it failed. Results of others are ignored."""
        candidate = self._running.pop(uid, None)
        if candidate is not None and values is not None:
            losses = tuple(sign * value for sign, value in zip(self._signs, values, strict=True))
            self._results[uid] = _Result(candidate.parameters, candidate.schedule, losses, dict(excess))

    def draw(self, seed: int) -> dict[str, Value]:
        """One proposal that is no candidate yet; random parameters while there are too few results."""
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
        """A regression of each objective and limit that is modelled, by name."""
        milestone = FEWEST
        while GROWTH * milestone <= min(len(self._results), WINDOW):
            milestone = math.ceil(GROWTH * milestone)
        first = list(self._results.values())[:milestone]  # the same results in a search that is continued
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
    """A Gaussian process on features; the hyperparameters of its kernel are given."""

    def __init__(self, rows: Sequence[Mapping[str, float]], values: Sequence[float], kernel: Any) -> None:
        self._columns, self._scale = DictVectorizer(sparse=False), StandardScaler()
        inputs = self._scale.fit_transform(self._columns.fit_transform(rows))
        targets = _without_outliers(values)
        self._process = GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True).fit(inputs, targets)
        self._noise = kernel.k2.noise_level * np.square(np.std(targets))

    def predict(self, rows: Sequence[Mapping[str, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Means, and standard deviations without the noise of a single evaluation."""
        inputs = self._scale.transform(self._columns.transform(rows))
        mean, deviation = self._process.predict(inputs, return_std=True)
        return mean, np.sqrt(np.maximum(np.square(deviation) - self._noise, 1e-12))


def _computed(target: Target, metric: str, schedule: Schedule) -> float:
    value = METRICS[metric].of(target, schedule)
    assert value is not None, "without thresholds a cost does not depend on the images"
    return value


def fitted_kernel(rows: Sequence[Mapping[str, float]], values: Sequence[float]) -> Any:
    """A kernel of smooth functions with noise, fitted by maximum likelihood to at most MOST_FITTED results."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_FITTED)).astype(int))
    inputs = DictVectorizer(sparse=False).fit_transform([rows[index] for index in chosen])
    kernel = ConstantKernel(1.0) * RBF(5.0, (3.0, 1e3)) + WhiteKernel(0.5, (1e-2, 1e1))
    process = GaussianProcessRegressor(kernel, normalize_y=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a hyperparameter may end at its bound
        process.fit(StandardScaler().fit_transform(inputs), _without_outliers([values[index] for index in chosen]))
    return process.kernel_


def _without_outliers(values: Sequence[float]) -> np.ndarray:
    """The values, those far above the others set to three interquartile ranges above the upper quartile: one training
    that collapsed would otherwise hide every other difference."""
    found = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(found, (25, 75))
    return np.minimum(found, high + 3 * (high - low)) if high > low else found


def _gains(hoped: np.ndarray, believed: np.ndarray) -> np.ndarray:
    """The hypervolume that each of the points adds to a front; all in units of the front's extent.

    hoped: (points, objectives), optimistic predictions. believed: (front, objectives). Returns (points,).
    """
    reference = np.full(believed.shape[1], 1.0 + BEYOND)
    base = hypervolume(believed, reference)
    return np.array([hypervolume(np.vstack([believed, point]), reference) for point in hoped]) - base
