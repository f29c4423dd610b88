"""Optuna's samplers as proposers: asked through a study in memory that always has the same space.

The study in the storage is never asked: on SQLite one question costs dozens of statements. The model study is rebuilt
from the records when a search continues. Each question gets a fresh sampler with its own seed, so that an answer
depends on what was told and on the seed, and not on how often the process was restarted.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from prunesearch.samplers.proposer import ProposerSettings
from prunesearch.space.choices import Value, dimensions
from prunesearch.study.distributions import distribution_of, quiet_optuna


class ModelStudy:
    """The proposer of an Optuna sampler.

    create: Optuna's class, or a function that gives one of its objects; called with `seed`.
    """

    def __init__(self, settings: ProposerSettings, create: Callable[..., BaseSampler]) -> None:
        self._create, self._startup = create, settings.startup
        self._window = settings.sampler.window
        self._generation_key: str | None = None
        if settings.sampler.counts_generations:  # as Optuna names it
            self._generation_key = f"{type(create(seed=0)).__name__}:generation"
        self._distributions = {
            name: distribution_of(dimension) for name, dimension in dimensions(settings.space).items()
        }
        self._memory = _Memory()
        with quiet_optuna():
            self._study = optuna.create_study(
                storage=self._memory, directions=[objective.goal for objective in settings.objectives]
            )
        self._signs = tuple(1.0 if objective.goal == "minimize" else -1.0 for objective in settings.objectives)
        self._ids: dict[str, int] = {}
        self._candidates: list[int] = []
        self._recent: deque[int] = deque(maxlen=self._window)
        self._front: dict[int, tuple[float, ...]] = {}
        self._running: set[int] = set()
        self._generation_of: dict[int, int] = {}
        self._finished_in: Counter[int] = Counter()
        self._asked: int | None = None

    def draw(self, seed: int) -> dict[str, Value]:
        """One proposal; the question itself leaves no trace in the study."""
        if not self._distributions:
            return {}
        if self._generation_key is not None and self._asked != (generation := self._generation()):
            # Optuna selects the parents of a generation at the first question and remembers them, in another order.
            # The order changes the answer. The second question always finds the remembered order, also in a search
            # that was continued.
            self._asked = generation
            self._ask(seed)
        return self._ask(seed)

    def _ask(self, seed: int) -> dict[str, Value]:
        self._memory.visible = self._candidates  # without the trials that earlier questions left there
        if self._window is not None:
            self._memory.visible = sorted(self._running | self._front.keys() | set(self._recent))
        self._study.sampler = _with_fixed_space(self._create(seed=seed), self._distributions)
        trial = self._study.ask(fixed_distributions=self._distributions)
        self._study.tell(trial, state=TrialState.FAIL)
        return dict(trial.params)

    def add(self, uid: str, parameters: Mapping[str, Value]) -> None:
        """A candidate runs now. It has every parameter of the space."""
        generation = self._generation()
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(parameters),
            distributions=self._distributions,
            system_attrs={} if self._generation_key is None else {self._generation_key: generation},
        )
        study_id = self._memory.get_study_id_from_name(self._study.study_name)
        self._ids[uid] = self._memory.create_new_trial(study_id, template_trial=trial)
        self._running.add(self._ids[uid])
        self._candidates.append(self._ids[uid])
        self._generation_of[self._ids[uid]] = generation

    def _generation(self) -> int:
        """The generation of a candidate that is added now, as NSGA-II counts: the next one begins when `startup`
        candidates of the last one are complete."""
        last = max(self._finished_in, default=0)
        return last + (self._finished_in[last] >= self._startup)

    def tell(self, uid: str, values: Sequence[float] | None, excess: Mapping[str, float]) -> None:
        """The result of a candidate that runs; None when it failed. Results of others are ignored."""
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
    """Optuna's storage in memory, which can hide trials from samplers."""

    visible: Sequence[int] | None = None
    """Numbers of the trials that samplers see, ascending; None is all."""

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if states == (TrialState.WAITING,):  # Optuna asks this before each question; no trial ever waits
            return []
        if self.visible is None:
            return super().get_all_trials(study_id, deepcopy, states)
        trials = super().get_all_trials(study_id, deepcopy=False)  # their numbers are their places
        seen = (trials[number] for number in self.visible)
        found = [trial for trial in seen if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found


def _with_fixed_space(sampler: BaseSampler, space: dict[str, BaseDistribution]) -> BaseSampler:
    """The same sampler, told which parameters all trials share; by itself it would look at every trial for this.

    The method is replaced on the object and not in a subclass, because NSGA-II stores generations by its class name.
    """
    sampler.infer_relative_search_space = lambda study, trial: space  # type: ignore[method-assign]
    return sampler
