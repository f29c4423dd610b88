"""Workers on Ray: one actor per slot, which keeps model and data loaded between candidates.

Ray's own retries are off: the driver counts attempts, so that the storage has all of them. An actor whose process dies,
hangs or runs out of memory is replaced; the others are not affected. Tasks are only given to actors that have started.
When a node is lost, the replaced actors wait for room while the others continue.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Ray reads these when it is imported or started. The driver itself reports dead workers and retries after an
# out-of-memory kill, which it treats as a crash.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
os.environ.setdefault("RAY_task_oom_retries", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # normal priority, because the speed of evaluations is measured
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray._private.services

from prunesearch.config import WorkersConfig
from prunesearch.errors import ResourceError
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.printable import counted
from prunesearch.workers.outbox import evaluate_into
from prunesearch.workers.protocol import (
    EVALUATE,
    Lost,
    Outcome,
    find_evaluate,
    log_to,
    spoils_its_process,
    took_too_long,
)

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 15.0
"""How long the head node of a cluster may take to accept a connection."""


@dataclass
class _Slot:
    """An actor and its current task, which began at `since` (`time.monotonic`). ready: resolves when it has started."""

    number: int
    actor: Any
    ready: Any
    has_started: bool = False
    task: Task | None = None
    result: Any = None
    since: float = 0.0


class RayWorkers:
    """A pool of actors on this machine or on a cluster. Raises ResourceError when they do not fit there.

    folder: of the study; the workers' logs go there. On a cluster, folder and outbox should be on a shared disk.
    """

    def __init__(self, config: WorkersConfig, folder: Path, outbox: Path, evaluate: str = EVALUATE) -> None:
        self._config, self._folder, self._outbox, self._evaluate = config, folder, outbox, evaluate
        self._slots: list[_Slot] = []
        self._queue: deque[Task] = deque()
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _start_ray(config.address)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self.count = _slots(config, nodes)
            self.description = _description(config, self.count, nodes)
            for number in range(self.count):
                self._slots.append(self._new_slot(number))
        except BaseException:
            self.close()
            raise

    def submit(self, task: Task) -> None:
        self._queue.append(task)
        self._hand_out()

    def wait(self, seconds: float) -> list[Outcome]:
        busy = {slot.result: slot for slot in self._slots if slot.task is not None}
        if not busy and not self._queue:
            return []
        starting = {slot.ready: slot for slot in self._slots if not slot.has_started}
        news = [*busy, *starting]
        done, _ = ray.wait(news, num_returns=1, timeout=seconds)
        done, _ = ray.wait(news, num_returns=len(news), timeout=0) if done else (done, _)
        outcomes: list[Outcome] = [self._take(busy[result]) for result in done if result in busy]
        for ready in done:
            if ready in starting:
                outcomes += self._take_started(starting[ready])
        outcomes += self._take_hung([slot for result, slot in busy.items() if result not in done])
        self._hand_out()
        return outcomes

    def close(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor, no_restart=True)
        if self._owns_ray:
            ray.shutdown()

    def _hand_out(self) -> None:
        for slot in self._slots:
            if self._queue and slot.has_started and slot.task is None:
                slot.task, slot.since = self._queue.popleft(), time.monotonic()
                slot.result = slot.actor.evaluate.remote(slot.task)

    def _take_started(self, slot: _Slot) -> list[Outcome]:
        """Mark an actor as started. If it died while starting, replace it and count a crash for the next task."""
        try:
            ray.get(slot.ready)
            slot.has_started = True
        except ray.exceptions.RayError as error:
            self._replace(slot)
            return [(self._queue.popleft(), Lost("crash", _last_line(error)))] if self._queue else []
        return []

    def _take(self, slot: _Slot) -> Outcome:
        task, slot.task = slot.task, None
        assert task is not None
        try:
            evaluation: Evaluation = ray.get(slot.result)
        except ray.exceptions.RayTaskError as error:  # the evaluation raised; its worker is alive
            return task, Lost("error", f"{type(error.cause).__name__}: {error.cause}")
        except ray.exceptions.RayError as error:
            self._replace(slot)
            return task, Lost("crash", _last_line(error))
        if spoils_its_process(evaluation):
            self._replace(slot)
        return task, evaluation

    def _take_hung(self, working: list[_Slot]) -> list[Outcome]:
        hung: list[Outcome] = []
        for slot in working:
            assert slot.task is not None
            lost = took_too_long(slot.task, slot.since, self._config.timeout)
            if lost is not None:
                hung.append((slot.task, lost))
                self._replace(slot)
        return hung

    def _replace(self, slot: _Slot) -> None:
        ray.kill(slot.actor, no_restart=True)
        self._slots[self._slots.index(slot)] = self._new_slot(slot.number)

    def _new_slot(self, number: int) -> _Slot:
        config = self._config
        remote: Any = ray.remote(_Actor)
        actor_class = remote.options(
            num_cpus=config.cpus_each, num_gpus=config.gpus_each, max_restarts=0, max_task_retries=0
        )
        log = self._folder / "logs" / f"worker-{number}.log"
        actor = actor_class.remote(
            self._outbox, self._evaluate, log, os.getcwd(), sys.path, hide_gpus=not config.gpus_each
        )
        return _Slot(number, actor, actor.ready.remote())


class _Actor:
    """The process of one slot."""

    def __init__(
        self, outbox: Path, evaluate: str, log: Path, directory: str, import_paths: list[str], hide_gpus: bool
    ) -> None:
        if hide_gpus:  # Ray does not hide GPUs from actors without GPUs
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if os.path.isdir(directory):  # as for the driver, for relative paths in the study file
            os.chdir(directory)
        sys.path += [path for path in import_paths if path not in sys.path]
        log_to(log)
        self._outbox, self._evaluate = outbox, find_evaluate(evaluate)

    def ready(self) -> None:
        """Do nothing. Ray runs this after the constructor, so its result shows that the actor has started."""

    def evaluate(self, task: Task) -> Evaluation:
        return evaluate_into(self._outbox, self._evaluate, task)


def _start_ray(address: str | None) -> None:
    """Start Ray on this machine, or join the cluster at `address`. Raises ResourceError when that fails."""
    if address is None and "RAY_ADDRESS" in os.environ:
        logger.warning(
            "RAY_ADDRESS is set, but workers.address is absent, so that Ray is started on this machine. To join that "
            "cluster, write workers.address: auto."
        )
    elif address is not None:
        _check_answers(address)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError, SystemExit) as error:  # SystemExit: a cluster does not answer
        ray.shutdown()
        if address is not None:
            raise _no_cluster(address, f"{error}" or type(error).__name__) from error
        if "AF_UNIX" not in str(error):
            raise ResourceError(
                f"workers: Ray does not start on this machine: {_last_line(error)}. Possible: kind: serial, or an "
                f"address of a cluster. Look into the logs in {_ray_folder()}/session_latest/logs."
            ) from error
        raise ResourceError(
            f"workers: Ray's folder {_ray_folder()} has too long a path for the sockets in it. Possible: about 40 "
            f"characters; it is RAY_TMPDIR, else TMPDIR, else /tmp. Set RAY_TMPDIR to a short path, such as /tmp."
        ) from error


def _check_answers(address: str) -> None:
    """Raise ResourceError when nothing listens at an address. Ray itself would take two minutes and then exit."""
    try:
        # auto: RAY_ADDRESS, or the last cluster started on this machine, which may be gone
        is_auto = address == "auto"
        where = str(ray._private.services.canonicalize_bootstrap_address(address)) if is_auto else address
        parts = urlsplit(where if "://" in where else f"//{where}")
        if parts.hostname is None or parts.port is None:
            raise ValueError("it is not of the form HOST:PORT")
        socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, str(error).rstrip(".")) from error


def _no_cluster(address: str, why: str) -> ResourceError:
    return ResourceError(
        f"workers.address: no Ray cluster at {address!r}: {why}. Possible: the address of a running cluster, "
        f"auto, or nothing (Ray is started on this machine). Check it, or leave it out; when the cluster asks for "
        f"a token, set RAY_AUTH_MODE=token."
    )


def _ray_folder() -> str:
    parent = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return os.path.join(parent, "ray")


def _slots(config: WorkersConfig, nodes: list[dict[str, float]]) -> int:
    """The number of workers: as many as asked for, else as many as fit. Raises ResourceError."""
    has = f"{_total(nodes, 'CPU'):g} CPUs and {_total(nodes, 'GPU'):g} GPUs on {len(nodes)} node(s)"
    if config.gpus_each > 1 and config.gpus_each % 1:
        raise ResourceError(
            f"workers.gpus_each: {config.gpus_each:g}; possible: a fraction up to 1, or a whole number. Round it."
        )
    if not config.gpus_each and config.device.startswith("cuda"):
        raise ResourceError(
            f"workers.gpus_each: 0, but workers.device is {config.device}. There are {has}. "
            f"Give each worker a GPU or a fraction of one, or set device to auto."
        )
    fit = sum(_room(config, node) for node in nodes)
    wanted = config.count or 1
    if wanted > fit:
        each = f"{config.cpus_each:g} CPUs and {config.gpus_each:g} GPUs"
        raise ResourceError(
            f"workers: {wanted} with {each} each were asked for, but there are {has}. "
            f"Possible: up to {fit} such workers. Lower workers.count, cpus_each or gpus_each."
        )
    return config.count or fit


def _room(config: WorkersConfig, node: dict[str, float]) -> int:
    """How many workers fit on one node. With gpus_each below 1, no worker is split between two GPUs."""
    fit = int(node.get("CPU", 0) / config.cpus_each)
    gpus = node.get("GPU", 0)
    if config.gpus_each >= 1:
        fit = min(fit, int(gpus / config.gpus_each))
    elif config.gpus_each:
        fit = min(fit, int(gpus) * int(1 / config.gpus_each))
    return fit


def _total(nodes: list[dict[str, float]], resource: str) -> float:
    return sum(node.get(resource, 0) for node in nodes)


def _description(config: WorkersConfig, count: int, nodes: list[dict[str, float]]) -> str:
    text = f"{counted(count, 'Ray worker')}, {config.cpus_each:g} CPU each"
    if config.gpus_each:
        return f"{text}, {config.gpus_each:g} GPU each"
    unused = _total(nodes, "GPU")
    return f"{text} ({unused:g} GPUs stay unused: workers.gpus_each is 0)" if unused else text


def _last_line(error: BaseException) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
