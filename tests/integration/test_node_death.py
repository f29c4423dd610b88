"""A cluster node dies during a task: only its candidate is evaluated again, on another node."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from slow_nodes import wait_after
from test_ray_workers import CONFIG

from prunesearch.config import Budget, StopConfig, WorkersConfig
from prunesearch.search.driver import run_study
from prunesearch.search.events import Event, Finished, Retrying
from prunesearch.study.reader import open_study_readonly
from prunesearch.workers.ray_pool import ray

pytestmark = pytest.mark.slow
QUICK_TO_NOTICE = {"health_check_period_ms": 500, "health_check_failure_threshold": 5}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster with a head node of one CPU, to which this process is connected."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # with a lower priority workers take minutes to start
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": QUICK_TO_NOTICE})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_dead_node_costs_what_it_was_doing(tmp_path: Path, cluster: Any) -> None:
    doomed = cluster.add_node(num_cpus=1)
    (tmp_path / "nodes").write_text(f"{cluster.head_node.node_id} {doomed.node_id}")
    events: list[Event] = []

    def kill_the_node() -> None:
        wait_after(tmp_path, tmp_path / "hit")
        cluster.remove_node(doomed, allow_graceful=False)

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, Retrying):
            (tmp_path / "noticed").touch()
        if isinstance(event, Finished) and event.evaluation.attempt:
            cluster.add_node(num_cpus=1)

    threading.Thread(target=kill_the_node, daemon=True).start()
    config = replace(
        CONFIG,
        rungs=(Budget(images=64), Budget(images=128)),
        workers=WorkersConfig(kind="ray", retries=1),
        stop=StopConfig(trials=24),
    )
    done = run_study(config, tmp_path, evaluate="slow_nodes:evaluate", on_event=on_event)

    begun = [line.split() for line in (tmp_path / "ledger").read_text().splitlines()]
    times = Counter((uid, rung) for uid, rung, *_ in begun)
    [again] = [which for which, count in times.items() if count > 1]
    first, second = [line for line in begun if (line[0], line[1]) == again]
    assert [first[2], second[2]] == ["0", "1"] and first[3] == doomed.node_id != second[3]
    assert first[4] == second[4] == f"{again[0]}.0"  # both continue from the checkpoint of the rung below
    assert [event.record.uid for event in events if isinstance(event, Retrying)] == [again[0]]
    assert len({node for _, _, _, node, _ in begun}) == 3
    records = open_study_readonly(tmp_path).records()
    assert len(records) == 24 and done.running == 0 and done.failed == 0
    assert sum(len(record.evaluations) for record in records) == len(times)
