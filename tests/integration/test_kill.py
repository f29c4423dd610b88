"""kill -9 of the command at different moments: no finished evaluation is lost or repeated."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from prunesearch.errors import RunError, StudyError
from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record
from prunesearch.strict import from_mapping
from prunesearch.study.reader import open_study_readonly

STUDY = """
version: 1
name: kill
model: {name: vit_digits_patch1_8, pretrained: true}
data: {name: digits, val_images: 64}
space:
  blocks: [1, 2, 3, 4, 5, 6]
  reduce: [drop, fuse, merge]
  start_from: [evit-0.7]
sampler: {name: tpe, seed: 3}
workers: {kind: serial, device: cpu}
stop: {trials: TRIALS}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # 20 starts of Python with torch are slow
@pytest.mark.parametrize(("kills", "trials"), [(5, 30), (20, 120)])
def test_nothing_finished_is_lost(tmp_path: Path, kills: int, trials: int) -> None:
    (tmp_path / "study.yaml").write_text(STUDY.replace("TRIALS", str(trials)))
    folder = tmp_path / "outputs" / "kill"
    moments = random.Random(0)
    known: dict[str, Evaluation] = {}
    for kill in range(kills):
        process = start(tmp_path)
        try:
            wait_for_more(process, folder, len(finished(folder)) + 1 + kill % 3)
            time.sleep(moments.random() * 0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        known |= delivered(folder) | finished(folder)
    assert kills <= len(known) < trials
    process = start(tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    records = read(folder)
    assert len(records) == len({record.uid for record in records}) == trials
    assert {record.state for record in records} == {"complete"}
    assert [record.number for record in records] == list(range(trials))
    for record in records:
        # equal down to the measured seconds, so it was not repeated
        assert record.uid not in known or record.evaluation == known[record.uid]
    assert not list((folder / "outbox").glob("*.json"))


def start(place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prunesearch", "run", "study.yaml", "--no-progress"]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_more(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while finished_count(folder) < count:
        if process.poll() is not None:
            output = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"it ended by itself: {output}")
        assert time.monotonic() < deadline, "it does not get on"
        time.sleep(0.05)


def finished_count(folder: Path) -> int:
    """Same as `len(finished(folder))`, but cheap enough for polling."""
    try:
        with closing(sqlite3.connect(f"file:{folder}/study.db?mode=ro", uri=True)) as connection:
            (count,) = connection.execute("SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'FAIL')").fetchone()
    except sqlite3.OperationalError:
        return 0  # it is being made
    return int(count)


def read(folder: Path) -> list[Record]:
    try:
        reader = open_study_readonly(folder)
    except (StudyError, RunError):
        return []  # it is being made
    try:
        return reader.records()
    finally:
        reader.close()


def finished(folder: Path) -> dict[str, Evaluation]:
    return {record.uid: record.evaluation for record in read(folder) if record.state != "running" and record.evaluation}


def delivered(folder: Path) -> dict[str, Evaluation]:
    """The results in the outbox."""
    entries = [json.loads(path.read_text()) for path in (folder / "outbox").glob("[!.]*.json")]
    evaluations = [from_mapping(Evaluation, entry["evaluation"], "outbox") for entry in entries]
    return {evaluation.uid: evaluation for evaluation in evaluations}
