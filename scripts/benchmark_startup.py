#!/usr/bin/env python
"""Measure what starting costs: read-only commands, and `run` up to its first result, beside importing torch and timm.

    python scripts/benchmark_startup.py         # about ten minutes; writes benchmarks/startup.md

Each command is a process of its own, from its start to its end. Files are in the page cache, as one round goes before.
Python keeps the bytecode of what it imports; where it may not (PYTHONDONTWRITEBYTECODE, a read-only installation that
was never compiled), it compiles every module again in every process, so both are measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

HOME = Path(__file__).parents[1]
STUDY = """
version: 1
name: small
model: {name: vit_digits_patch1_8, pretrained: true}
data: {name: digits, train_images: 60, val_images: 60}
space: {blocks: [1, 3, 5], keep: [0.5, 0.7, 1.0], reduce: [drop, squeeze], start_from: [etps-0.7]}
rungs: [{images: 0}]
workers: {kind: serial}
stop: {trials: 5}
"""
VERBS = (
    "--help",
    "status outputs/small",
    "front outputs/small",
    "export outputs/small -o best.yaml",
    "check small.yaml",
    "check best.yaml --model deit_small_patch16_224",
    *(f"list {what}" for what in ("models", "presets", "scores", "reduces", "recipes", "metrics", "samplers")),
    "schema",
)
RUNS = {"serial": "kind=serial", "Ray": "kind=ray"}
GOALS = {"status": 1.5, "front": 1.5, "export": 1.5, "list": 1.5, "check": 2.0}


def environment_of(folder: Path, keeps_bytecode: bool) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
    environment["PYTHONDONTWRITEBYTECODE"] = "" if keeps_bytecode else "1"
    environment["PYTHONPYCACHEPREFIX"] = str(folder / ("bytecode" if keeps_bytecode else "none"))
    return environment


def seconds(command: list[str], folder: Path, keeps_bytecode: bool) -> float:
    """From the start of a process to its end."""
    environment = environment_of(folder, keeps_bytecode)
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def seconds_of_run(workers: str, folder: Path) -> list[float]:
    """From the start of a search of the digits to its first line, to "starting" (workers and data are ready), and to
    its first result, an evaluation of a second or two without training."""
    study, out = HOME / "search_spaces" / "digits.yaml", tempfile.mkdtemp(dir=folder)
    command = [
        sys.executable,
        "-m",
        "prunesearch",
        "run",
        str(study),
        "--output",
        out,
        "--no-progress",
        "--trials",
        "1",
    ]
    command += ["--set", f"workers.{workers}", "--set", "rungs=[{images: 0}]"]
    begin, found = time.perf_counter(), []
    with subprocess.Popen(command, cwd=folder, env=environment_of(folder, True), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not found or b": starting" in line or line.startswith(b"1/1"):
                found.append(time.perf_counter() - begin)
    assert process.returncode == 0 and len(found) == 3
    return found


def measure(rounds: int) -> tuple[dict[str, tuple[float, float]], dict[str, list[float]]]:
    """Median seconds of each command, with bytecode that was kept and without; and those of `seconds_of_run`."""
    commands = {f"python -c 'import {name}'": ["-c", f"import {name}"] for name in ("torch", "timm")}
    commands |= {f"prunesearch {verb}": ["-m", "prunesearch", *verb.split()] for verb in VERBS}
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in commands}
    runs: dict[str, list[list[float]]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "small.yaml").write_text(STUDY)
        seconds(["-m", "prunesearch", "run", "small.yaml", "--no-progress"], folder, keeps_bytecode=True)
        for _ in range(rounds + 1):
            for name, command in commands.items():
                kept, compiled = taken[name]
                kept.append(seconds(command, folder, keeps_bytecode=True))
                compiled.append(seconds(command, folder, keeps_bytecode=False))
                print(f"{name}: {kept[-1]:.2f} s, without bytecode {compiled[-1]:.2f} s", flush=True)
            for name, workers in RUNS.items():
                runs[name].append(seconds_of_run(workers, folder))
                print(f"run, {name}: {', '.join(f'{each:.2f}' for each in runs[name][-1])} s", flush=True)
    return (
        {name: (median(kept[1:]), median(compiled[1:])) for name, (kept, compiled) in taken.items()},
        {name: [median(each) for each in zip(*found[1:], strict=True)] for name, found in runs.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    commands, runs = measure(arguments.rounds)
    for name, (kept, compiled) in commands.items():
        goal = GOALS.get(name.split()[1], "") if name.startswith("prunesearch") else ""
        rows.append(f"| `{name}` | {kept:.2f} | {goal} | {compiled:.2f} |")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} when it began"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "optuna"))
    text = f"""# What looking costs

Written by `scripts/benchmark_startup.py`. Seconds from the start of a process to its end, median of {arguments.rounds}
rounds in which all commands take turns. Python {platform.python_version()}, {versions};
{machine}. The study is one of the digits ViT with 5 candidates in SQLite.
Importing torch and timm in the same rounds says how fast the machine was. The last column is for installations where
Python may not keep bytecode (PYTHONDONTWRITEBYTECODE), so that each process compiles all that it imports.

| command | seconds | goal, idle | without bytecode |
|---|--:|--:|--:|
"""
    lines = [f"| {name} | " + " | ".join(f"{each:.1f}" for each in found) + " |" for name, found in runs.items()]
    text += (
        "\n".join(rows)
        + """

`prunesearch run search_spaces/digits.yaml` with one candidate and no training, bytecode kept. Ray and its
workers start when the driver has opened data and weights, and import PyTorch after it.

| workers | first line | data and workers are ready | first result |
|---|--:|--:|--:|
"""
    )
    (HOME / "benchmarks" / "startup.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
