"""The worker in a child process: an evaluation that exits, crashes or hangs fails its candidate only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import driving  # noqa: F401  finds fake_search
import fake_search
import pytest
from fake_search import finished, records, run, study

from prunesearch.config import Budget, WorkersConfig
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.schedule import Schedule, Stage
from prunesearch.workers.child import ChildWorker
from prunesearch.workers.outbox import delivered
from prunesearch.workers.protocol import Lost, Outcome

PATIENCE = 280.0
"""Seconds. Imports take a minute on a busy machine."""
SERIAL = WorkersConfig(kind="serial")


def task(uid: str, stages: int = 0) -> Task:
    schedule = Schedule(tuple(Stage(block, keep=0.5) for block in range(1, stages + 1)))
    return Task(uid, study().model, study().data, schedule, Budget(images=0))


def outcome(worker: ChildWorker, given: Task) -> Evaluation | Lost:
    worker.submit(given)
    deadline, found = time.monotonic() + PATIENCE, list[Outcome]()
    while not found and time.monotonic() < deadline:
        found = worker.wait(0.5)
    [(task, what)] = found
    assert task == given
    return what


@pytest.mark.slow
def test_what_ends_or_hangs_costs_that_candidate(tmp_path: Path) -> None:
    worker = ChildWorker(replace(SERIAL, timeout=2.0), tmp_path, tmp_path / "outbox", "unlucky:evaluate")
    try:
        good = outcome(worker, task("a0"))
        assert isinstance(good, Evaluation) and good == replace(fake_search.evaluate(task("a0")), host=good.host)
        assert good.host != str(os.getpid())
        [(_, _, written)] = delivered(tmp_path / "outbox")
        assert written == good  # the outbox is written before the result is returned
        assert outcome(worker, task("a1", stages=3)) == Lost("error", "SystemExit: leaving")
        again = outcome(worker, task("a2"))
        assert isinstance(again, Evaluation) and again.host == good.host  # the same process
        assert outcome(worker, task("a3", stages=2)) == Lost("crash", "its process ended: exit code 3")
        assert outcome(worker, task("a4", stages=4)) == Lost("timeout", "no result after 2 s")
        assert isinstance(outcome(worker, task("a5")), Evaluation)
    finally:
        worker.close()
    assert worker.wait(0.1) == []


@pytest.mark.parametrize(
    "changes",
    [{"plugins": ("colorsys",)}, pytest.param({"workers": replace(SERIAL, timeout=100.0)}, marks=pytest.mark.slow)],
)
def test_plugins_and_timeouts_evaluate_in_a_child_with_the_same_numbers(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    here, _ = run(study(5), tmp_path / "here")
    there, events = run(study(5, **changes), tmp_path / "there")
    assert [record.evaluation.host == str(os.getpid()) for record in records(tmp_path / "here")] == [True] * 5
    assert os.getpid() not in {int(event.evaluation.host) for event in finished(events)}
    assert here.complete == there.complete == 5

    def numbers(folder: Path) -> list[object]:
        return [(record.uid, record.seed, record.evaluation.metrics) for record in records(folder)]

    assert numbers(tmp_path / "here") == numbers(tmp_path / "there")


@pytest.mark.slow
@pytest.mark.parametrize("ends", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGINT]])
def test_no_child_is_left_behind(tmp_path: Path, ends: list[signal.Signals]) -> None:
    """SIGKILL ends the driver at once. SIGTERM or Ctrl-C once asks it to stop, twice cancels running candidates."""
    code = (
        "from pathlib import Path; import sys; from dataclasses import replace; from fake_search import study\n"
        "from prunesearch.search.driver import run_study\n"
        "config = study(3); config = replace(config, workers=replace(config.workers, timeout=900.0))\n"
        "if __name__ == '__main__': run_study(config, Path(sys.argv[1]), evaluate='unlucky:never_end')\n"
    )
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(code)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    driver = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "study")],
        env={**os.environ, "PIDS": str(pids), "PYTHONPATH": paths},
    )
    try:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "the evaluation does not begin")
        children = [int(pid) for pid in pids.read_text().split()]
        driver.send_signal(ends[0])
        for end in ends[1:]:
            time.sleep(2)
            assert driver.poll() is None and all(map(lives, children))  # it waits for the running candidate
            driver.send_signal(end)
        driver.wait(timeout=60)
        wait_until(lambda: not any(map(lives, children)), "a child lives on")
    finally:
        driver.kill()


def wait_until(holds: object, else_say: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, else_say
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process runs. Zombies count as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
