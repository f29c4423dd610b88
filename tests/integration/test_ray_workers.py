"""Ray workers: whatever happens to one of them, the search continues and records it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mishaps import KINDS, mishap

from prunesearch.config import (
    ModelConfig,
    Objective,
    SamplerConfig,
    SpaceConfig,
    StopConfig,
    StudyConfig,
    WorkersConfig,
)
from prunesearch.errors import ResourceError, RunError, StudyError
from prunesearch.search.driver import run_study
from prunesearch.search.events import Event, Retrying
from prunesearch.study.reader import open_study_readonly
from prunesearch.workers.ray_pool import RayWorkers, _start_ray, ray

CONFIG = StudyConfig(
    version=1,
    name="mishaps",
    model=ModelConfig("vit_digits_patch1_8"),
    space=SpaceConfig(blocks=(1, 2, 3, 4, 5, 6)),
    objectives=(Objective("top1", "maximize"), Objective("gmacs", "minimize")),
    sampler=SamplerConfig("random"),
    workers=WorkersConfig(kind="ray", count=2, timeout=4.0, retries=1),
    stop=StopConfig(trials=9),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local Ray for all tests of this file. RayWorkers uses a running Ray and does not stop it."""
    _start_ray(None)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_every_mishap_stays_with_its_candidate(
    tmp_path: Path, cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    config = replace(CONFIG, stop=StopConfig(trials=11))
    done = run_study(config, tmp_path, evaluate="mishaps:evaluate", on_event=events.append)
    records = open_study_readonly(tmp_path).records()
    happened = Counter(mishap(record.uid) for record in records)
    assert all(happened[kind] for kind in KINDS.values()), happened
    assert done.complete == happened["fine"] + happened["dies once"] and done.running == 0
    expected = {"dies always": "crash", "hangs": "timeout", "raises": "error", "runs out of memory": "oom"}
    expected |= {"raises what cannot be pickled": "error", "reports NaN": "nan", "reports infinity": "nan"}
    for record in records:
        assert record.evaluation is not None
        assert record.evaluation.cause == expected.get(mishap(record.uid))
        assert record.evaluation.attempt == (mishap(record.uid) in ("dies once", "dies always"))
        if mishap(record.uid) == "fine":
            assert record.evaluation.host.endswith(" ")  # CUDA_VISIBLE_DEVICES is empty
    assert sum(isinstance(event, Retrying) for event in events) == happened["dies once"] + happened["dies always"]
    assert not list((tmp_path / "outbox").iterdir())
    assert ray.is_initialized()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "says"),
    [
        (WorkersConfig(gpus_each=64), "1 with 1 CPUs and 64 GPUs each were asked for, but there are"),
        (WorkersConfig(count=1000), "1000 with 1 CPUs and 0 GPUs each .* up to 2 such workers"),
        (WorkersConfig(cpus_each=64), "up to 0 such workers"),
        (WorkersConfig(gpus_each=1.5), "a fraction up to 1, or a whole number"),
        (WorkersConfig(device="cuda"), "workers.gpus_each: 0, but workers.device is cuda|'cuda' is not available on"),
    ],
)  # fmt: skip
def test_more_than_there_is_is_an_error_at_once(
    tmp_path: Path, cluster: None, workers: WorkersConfig, says: str
) -> None:
    with pytest.raises(ResourceError, match=says):
        run_study(replace(CONFIG, workers=workers), tmp_path)


def test_as_many_workers_as_fit(tmp_path: Path, cluster: None) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    workers = RayWorkers(WorkersConfig(cpus_each=2 * cpus / 3), tmp_path, tmp_path / "outbox")
    workers.close()
    assert (workers.count, workers.description) == (1, f"1 Ray worker, {2 * cpus / 3:g} CPU each")


SCRIPT = """
import sys
from pathlib import Path
from test_ray_workers import CONFIG, replace
from prunesearch.search.driver import run_study
if __name__ == "__main__":
    workers = replace(CONFIG.workers, count=None)
    run_study(replace(CONFIG, workers=workers), Path(sys.argv[1]), evaluate="slow:evaluate")
"""
SLOW = """
import time
from mishaps import *
from mishaps import evaluate as really
def mishap(uid): return "fine"
def evaluate(task):
    import mishaps
    mishaps.mishap = mishap
    time.sleep(0.3)
    return really(task)
"""


def test_a_killed_driver_loses_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "slow.py").write_text(SLOW)
    paths = [str(tmp_path), str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "study")]
    with (tmp_path / "output").open("w") as output:  # Ray's agents would keep a pipe open for a minute
        first = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    wait_for(lambda: len(finished(tmp_path / "study")) >= 4, seconds=120)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "output").read_text() == ""
    before = finished(tmp_path / "study")
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    after = finished(tmp_path / "study")
    assert len(after) == 9 and all(after[uid] == evaluation for uid, evaluation in before.items())
    assert len(open_study_readonly(tmp_path / "study").records()) == 9
    wait_for(lambda: not [line for line in processes() if str(tmp_path) in line], seconds=30)


def finished(folder: Path) -> dict[str, object]:
    try:
        reader = open_study_readonly(folder)
    except (StudyError, RunError):
        return {}  # not created yet
    try:
        return {record.uid: record.evaluation for record in reader.records() if record.state != "running"}
    finally:
        reader.close()


def wait_for(condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)  # polling is as expensive as a candidate


def processes() -> list[str]:
    return [
        path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists()
    ]
