"""An evaluation for a cluster that loses a node and gets a new one. Files in the study folder synchronise the steps."""

from __future__ import annotations

import time
from pathlib import Path

import ray

from prunesearch.evaluate.task import Evaluation, Task


def evaluate(task: Task) -> Evaluation:
    """Return made-up numbers, and log each start in `ledger`.

    The file `nodes` names the head and a doomed node. Rung 1 never ends on the doomed node, which creates `hit`. Rung 1
    on other nodes waits for `hit`. Then no evaluation ends until the test has created `noticed`, and after a second
    attempt none ends until a third node has created `arrived`.
    """
    assert task.save_to is not None
    folder = Path(task.save_to).parent.parent
    head, doomed = (folder / "nodes").read_text().split()
    node = ray.get_runtime_context().get_node_id()
    with (folder / "ledger").open("a") as ledger:
        ledger.write(f"{task.uid} {task.rung} {task.attempt} {node} {Path(task.resume_from or '-').name}\n")
    if node == doomed and task.rung == 1:
        (folder / "hit").touch()
        time.sleep(1000)
    if node not in (head, doomed):
        (folder / "arrived").touch()
    if task.rung == 1:
        wait_after(folder, folder / "hit")
    wait_after(folder / "hit", folder / "noticed")
    wait_after(folder / "tried again", folder / "arrived")
    if task.attempt:
        (folder / "tried again").touch()
    Path(task.save_to).parent.mkdir(exist_ok=True)
    Path(f"{task.save_to}.state").touch()
    keeps = [stage.keep or 1.0 for stage in task.schedule.stages]
    metrics = (("gmacs", 1.0 + sum(keeps)), ("top1", 90.0 - int(task.uid, 16) % 50 + task.rung))
    return Evaluation(
        task.uid,
        "complete",
        task.rung,
        task.attempt,
        metrics=metrics,
        images=task.budget.images or 0,
        checkpoint=task.save_to,
    )


def wait_after(begin: Path, end: Path) -> None:
    """If the file `begin` exists, wait for the file `end`."""
    while begin.exists() and not end.exists():
        time.sleep(0.05)
