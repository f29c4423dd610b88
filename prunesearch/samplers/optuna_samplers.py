"""Who proposes candidates: Optuna's samplers, asked through a study in memory that always has the same space.

The study in the storage is never asked: on SQLite one question costs dozens of statements. The model study is rebuilt
from the records when a search continues. Each question gets a fresh sampler with its own seed, so that an answer
depends on what was told and on the seed, and not on how often the process was restarted.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from prunesearch.config import Objective, SamplerConfig, SpaceConfig, StudyConfig
from prunesearch.registry import Registry
from prunesearch.space.choices import Value, dimensions
from prunesearch.study.distributions import distribution_of, quiet_optuna

WINDOW = 400
"""Finished candidates that TPE looks at, besides the front; its cost grows with their number."""
POPULATION = 50
MANY_CANDIDATES = 1000
MANY_WORKERS = 16
TOKEN_GP = "token_gp"
GENERATION_KEY = "NSGAIISampler:generation"


@dataclass(frozen=True)
class Sampler:
    """A registered sampler. `make(seed, startup)` gives Optuna's object, None is what is not of Optuna (`token_gp.py`,
    and auto, which leaves the work to others); `window` bounds what it sees, None is all."""

    name: str
    summary: str
    make: Callable[[int, int | None], BaseSampler] | None
    window: int | None = None
    draws: int = 25
    """Questions for one candidate before simpler ways take over; samplers repeat themselves once they are sure."""
    most_trials: int | None = None
    """Beyond this many candidates a question takes several seconds."""


SAMPLERS: Registry[Sampler] = Registry("sampler")


def _tpe(seed: int, startup: int | None) -> BaseSampler:
    n_startup_trials = 10 if startup is None else startup
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=n_startup_trials, multivariate=True, constant_liar=True
    )


def _nsga2(seed: int, startup: int | None) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=_population(startup))


def _gp(seed: int, startup: int | None) -> BaseSampler:
    n_startup_trials = 10 if startup is None else max(startup, 1)  # it cannot begin with no result
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=n_startup_trials)


def _random(seed: int, startup: int | None) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _population(startup: int | None) -> int:
    return POPULATION if startup is None else max(2, startup)


for _sampler in (
    Sampler("auto", "token_gp, and nsga2 for many candidates or workers; the default", None),
    Sampler(
        TOKEN_GP,
        "fills the space evenly, then a Gaussian process over the tokens in each block, by hypervolume",
        None,
        draws=4,
    ),
    Sampler("tpe", "tree-structured Parzen estimator over all parameters at once", _tpe, WINDOW, draws=8),
    Sampler("nsga2", "genetic algorithm, generations of 50 (or of sampler.startup)", _nsga2, draws=8),
    Sampler(
        "gp",
        "Gaussian process with expected hypervolume; for up to 200 costly candidates",
        _gp,
        draws=2,
        most_trials=200,
    ),
    Sampler("random", "uniform, the baseline", _random),
):
    SAMPLERS.add(_sampler.name, _sampler)


def in_charge(config: StudyConfig, known: int, workers: int) -> SamplerConfig:
    """Which sampler a study asks when it knows so many candidates and has so many workers: its own, if not auto.

    The questions of a Gaussian process take longer with each candidate, too long for many workers.
    """
    if config.sampler.name != "auto":
        return config.sampler
    many = known >= MANY_CANDIDATES or workers > MANY_WORKERS
    return replace(config.sampler, name="nsga2" if many else TOKEN_GP, startup=None)


class ModelStudy:
    """What a sampler knows: candidates by uid, running or with their objective values.

    Parameters are those of `space.parameters_of`; values are in the order and the units of the objectives.
    """

    def __init__(self, config: SamplerConfig, space: SpaceConfig, objectives: Sequence[Objective]) -> None:
        self._config, self._sampler = config, SAMPLERS[config.name]
        make = self._sampler.make
        assert make is not None, "others have a model of their own"
        self._make = make
        self._distributions = {name: distribution_of(dimension) for name, dimension in dimensions(space).items()}
        self._memory = _Memory()
        with quiet_optuna():
            self._study = optuna.create_study(
                storage=self._memory, directions=[objective.goal for objective in objectives]
            )
        self._signs = tuple(1.0 if objective.goal == "minimize" else -1.0 for objective in objectives)
        self._ids: dict[str, int] = {}
        self._candidates: list[int] = []
        self._recent: deque[int] = deque(maxlen=self._sampler.window)
        self._front: dict[int, tuple[float, ...]] = {}
        self._running: set[int] = set()
        self._generation_of: dict[int, int] = {}
        self._finished_in: Counter[int] = Counter()
        self._asked: int | None = None

    def draw(self, seed: int) -> dict[str, Value]:
        """One proposal. It leaves no trace: `add` says which proposals become candidates."""
        if not self._distributions:
            return {}
        if self._config.name == "nsga2" and self._asked != (generation := self._generation()):
            # The parents of a generation come in one order when Optuna selects them, and in another whenever it
            # remembers them. A search that was continued selects anew, so the second answer is the one to rely on.
            self._asked = generation
            self._ask(seed)
        return self._ask(seed)

    def _ask(self, seed: int) -> dict[str, Value]:
        self._memory.visible = self._candidates  # and not what earlier questions left there
        if self._sampler.window is not None:
            self._memory.visible = sorted(self._running | self._front.keys() | set(self._recent))
        self._study.sampler = _with_fixed_space(self._make(seed, self._config.startup), self._distributions)
        trial = self._study.ask(fixed_distributions=self._distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        return dict(trial.params)

    def add(self, uid: str, parameters: Mapping[str, Value]) -> None:
        """A candidate that runs now. It has every parameter of the space."""
        generation = self._generation()
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(parameters),
            distributions=self._distributions,
            system_attrs={GENERATION_KEY: generation} if self._config.name == "nsga2" else {},
        )
        study_id = self._memory.get_study_id_from_name(self._study.study_name)
        self._ids[uid] = self._memory.create_new_trial(study_id, template_trial=trial)
        self._running.add(self._ids[uid])
        self._candidates.append(self._ids[uid])
        self._generation_of[self._ids[uid]] = generation

    def _generation(self) -> int:
        """Of a candidate that is new now, as NSGA-II counts: one is full when so many of it are complete."""
        last = max(self._finished_in, default=0)
        return last + (self._finished_in[last] >= _population(self._config.startup))

    def tell(self, uid: str, values: Sequence[float] | None, excess: Mapping[str, float]) -> None:
        """The result of a candidate: None when it failed. `excess` above 0 breaks a limit. Others are ignored."""
        number = self._ids.get(uid)
        if number not in self._running:
            return  # it lies outside the space, or was told before
        self._running.discard(number)
        trial = optuna.trial.Trial(self._study, number)
        if values is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        for name, amount in excess.items():
            trial.set_constraint(name, amount)
        self._study.tell(trial, list(values))
        self._finished_in[self._generation_of[number]] += 1
        self._recent.append(number)
        if all(amount <= 0 for amount in excess.values()):
            self._update_front(number, tuple(sign * value for sign, value in zip(self._signs, values, strict=True)))

    def _update_front(self, number: int, losses: tuple[float, ...]) -> None:
        def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
            return one != other and all(a <= b for a, b in zip(one, other, strict=True))

        if not any(dominates(known, losses) for known in self._front.values()):
            self._front = {key: known for key, known in self._front.items() if not dominates(losses, known)}
            self._front[number] = losses


class _Memory(InMemoryStorage):
    """Optuna's storage in memory that can hide trials from samplers."""

    visible: Sequence[int] | None = None
    """Their numbers, ascending; None is all."""

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if states == (TrialState.WAITING,):  # asked before each question, of all trials; none ever waits
            return []
        if self.visible is None:
            return super().get_all_trials(study_id, deepcopy, states)
        trials = super().get_all_trials(study_id, deepcopy=False)  # their numbers are their places
        seen = (trials[number] for number in self.visible)
        found = [trial for trial in seen if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found


def _with_fixed_space(sampler: BaseSampler, space: dict[str, BaseDistribution]) -> BaseSampler:
    """The sampler, but it need not go through all trials to find out which parameters they share.

    Set on the object: a subclass under another name would lose NSGA-II's generations, which are stored by class name.
    """
    sampler.infer_relative_search_space = lambda study, trial: space  # type: ignore[method-assign]
    return sampler
