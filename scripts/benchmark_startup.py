#!/usr/bin/env python
"""Measure the start-up time of read-only commands, compared with importing torch and timm.

    python scripts/benchmark_startup.py         # five to ten minutes; writes benchmarks/startup.md

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
GOALS = {"status": 1.5, "front": 1.5, "export": 1.5, "list": 1.5, "check": 2.0}


def seconds(command: list[str], folder: Path, keeps_bytecode: bool) -> float:
    """From the start of a process to its end."""
    environment = {**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
    environment["PYTHONDONTWRITEBYTECODE"] = "" if keeps_bytecode else "1"
    environment["PYTHONPYCACHEPREFIX"] = str(folder / ("bytecode" if keeps_bytecode else "none"))
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure(rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each command, with bytecode that was kept and without."""
    commands = {f"python -c 'import {name}'": ["-c", f"import {name}"] for name in ("torch", "timm")}
    commands |= {f"prunesearch {verb}": ["-m", "prunesearch", *verb.split()] for verb in VERBS}
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in commands}
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
    return {name: (median(kept[1:]), median(compiled[1:])) for name, (kept, compiled) in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    for name, (kept, compiled) in measure(arguments.rounds).items():
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
    (HOME / "benchmarks" / "startup.md").write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
