"""Simulated workers: they answer from a table in virtual time, so that a whole search is replayed in seconds, with any
number of workers and with failures.

    table = read_table(path, model_shape(config.model))
    workers = SimulatedWorkers(table, config, measured=Surrogate(table).measured, count=64)
    run_study(config, folder, storage="memory:", make_workers=lambda *_: workers)

The search itself is the real one. The same table, study and settings give the same sequence of events.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prunesearch.config import StudyConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import StudyError
from prunesearch.evaluate import model_shape
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.replay.table import Recorded, Table
from prunesearch.samplers.propose import seed_of
from prunesearch.schedule import Schedule
from prunesearch.workers.protocol import Lost, Outcome


@dataclass(frozen=True)
class Failures:
    """Probabilities that a task ends with the death of its worker, with a worker that hangs, or with an error.

    A hang is over after `workers.timeout` of the study; without one, after ten times what the task would have taken.
    """

    crash: float = 0.0
    timeout: float = 0.0
    error: float = 0.0


NEVER = Failures()


@dataclass(frozen=True)
class SimulatedTask:
    """A task that has ended: when it began and ended, in virtual seconds, and its outcome."""

    began: float
    ended: float
    task: Task
    outcome: Evaluation | Lost


class OutOfTime(KeyboardInterrupt):
    """Virtual time is over. The driver treats it as a second Ctrl-C: it drops what runs."""


class SimulatedWorkers:
    """Workers for one study. An evaluation takes as long as the table says, plus `overhead` virtual seconds.

    measured: gives the result of a schedule at a rung of the table. The default looks it up in the table and raises
    StudyError when it is not there; `Surrogate.measured` also knows other schedules. seconds: `wait` raises OutOfTime
    when this much virtual time is over. now: the virtual time; may be set to count what was done before the search.
    finished: tasks that have ended, in order.
    """

    def __init__(
        self,
        table: Table,
        config: StudyConfig,
        *,
        measured: Callable[[Schedule, int], Recorded] | None = None,
        count: int = 1,
        overhead: float = 0.0,
        seconds: float = math.inf,
        failures: Failures = NEVER,
    ) -> None:
        self.count, self.description = count, f"{count} simulated workers"
        self.now = 0.0
        self.finished: list[SimulatedTask] = []
        self._measured, self._images = measured or partial(_in_table, table), table.images
        self._config, self._overhead, self._end, self._failures = config, overhead, seconds, failures
        self._under_way: list[tuple[float, int, SimulatedTask]] = []
        self._submitted = 0
        for rung, budget in enumerate(config.rungs):
            if budget.images not in table.images or budget.seconds is not None:
                known = ", ".join(map(str, table.images))
                raise StudyError(
                    f"rungs[{rung}]: not in the table that is replayed. Possible: {known} images. Take those as rungs."
                )

    def submit(self, task: Task) -> None:
        seconds, outcome = self._run(task)
        done = SimulatedTask(self.now, self.now + seconds, task, outcome)
        heapq.heappush(self._under_way, (done.ended, self._submitted, done))  # equal ends: in order of submission
        self._submitted += 1

    def wait(self, seconds: float) -> list[Outcome]:
        """The task that ends next; returns at once."""
        if not self._under_way:
            return []
        ended, _, done = heapq.heappop(self._under_way)
        if ended > self._end:
            self.now = self._end
            raise OutOfTime
        self.now = ended
        self.finished.append(done)
        return [(done.task, done.outcome)]

    def close(self) -> None:
        self._under_way.clear()

    def _run(self, task: Task) -> tuple[float, Evaluation | Lost]:
        images, before = self._config.rungs[task.rung].images, 0
        if task.rung > 0:
            before = self._config.rungs[task.rung - 1].images or 0
        rung = self._images.index(images or 0)
        metrics = self._measured(task.schedule, rung).metrics
        took = seconds_of(partial(self._measured, task.schedule), self._images, images or 0, before) + self._overhead
        draw = random.Random(seed_of("failures", self._config.sampler.seed, task.uid, task.rung, task.attempt))
        luck, share, failures = draw.random(), draw.random(), self._failures
        if (luck := luck - failures.crash) < 0:
            return share * took, Lost("crash", "the simulated worker died")
        if (luck := luck - failures.timeout) < 0:
            return self._config.workers.timeout or 10 * took, Lost("timeout", "the simulated worker hung")
        about: dict[str, Any] = {"host": "simulated", "device": "simulated", "seconds": (("simulated", took),)}
        if luck < failures.error:
            what = "the simulated evaluation failed"
            return share * took, Evaluation(task.uid, "failed", task.rung, task.attempt, "error", what, **about)
        about |= {"metrics": tuple(metrics.items()), "images": images or 0}
        about["tokens"] = estimate_cost(model_shape(task.model), task.schedule).tokens
        return took, Evaluation(task.uid, "complete", task.rung, task.attempt, **about)


def seconds_of(row: Callable[[int], Recorded], budgets: Sequence[int], images: int, before: int = 0) -> float:
    """Seconds to train a schedule from `before` to `images` images and then to measure it, by the table's seconds.

    The table also measured at each rung in between. The seconds of these measurements are subtracted where they are
    known: where the table has a rung without training.
    """
    rungs = [rung for rung, budget in enumerate(budgets) if before < budget <= images]
    if not rungs:
        return row(budgets.index(images)).seconds
    measuring = row(0).seconds if budgets[0] == 0 else 0.0
    return sum(row(rung).seconds for rung in rungs) - (len(rungs) - 1) * measuring


def _in_table(table: Table, schedule: Schedule, rung: int) -> Recorded:
    found = table.lookup(schedule, rung)
    if found is None:
        raise StudyError(
            f"{schedule}: the table that is replayed does not have it. Possible: its {len(table.rows)} schedules, or "
            f"what a Surrogate of it gives. Give one as `measured`."
        )
    return found
