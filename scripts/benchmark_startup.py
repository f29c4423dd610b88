#!/usr/bin/env python
"""Measure the start-up time of read-only commands, compared with importing torch and timm.

    python scripts/benchmark_startup.py                       # about three minutes; writes benchmarks/startup.md
    python scripts/benchmark_startup.py --before FOLDER       # also with the checkout in FOLDER, in the same turns

Each command is timed as a whole process. Commands run in turn, after one warm-up round that fills the page cache.
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


def seconds(command: list[str], home: Path, folder: Path) -> float:
    """Seconds from the start of a process to its end."""
    environment = {**os.environ, "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def measure(homes: list[Path], rounds: int) -> dict[str, list[float]]:
    """Median seconds of each command in each checkout."""
    commands = {f"python -c 'import {name}'": ["-c", f"import {name}"] for name in ("torch", "timm")}
    commands |= {f"prunesearch {verb}": ["-m", "prunesearch", *verb.split()] for verb in VERBS}
    taken: dict[str, list[list[float]]] = {name: [[] for _ in homes] for name in commands}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.yaml").write_text(STUDY)
        seconds(["-m", "prunesearch", "run", "small.yaml", "--no-progress"], homes[0], folder)
        for _ in range(rounds + 1):
            for name, command in commands.items():
                for place, home in enumerate(homes):
                    taken[name][place].append(seconds(command, home, folder))
                print(f"{name}: {', '.join(f'{times[-1]:.2f}' for times in taken[name])} s", flush=True)
    return {name: [median(times[1:]) for times in places] for name, places in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, for comparison")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    homes = [HOME] if arguments.before is None else [HOME, arguments.before.resolve()]
    load = os.getloadavg()[0]
    found = measure(homes, arguments.rounds)
    rows = []
    for name, times in found.items():
        goal = GOALS.get(name.split()[1]) if name.startswith("prunesearch") else None
        cells = [f"`{name}`", f"{times[0]:.2f}", "" if goal is None else f"{goal:g}", *(f"{t:.2f}" for t in times[1:])]
        rows.append(f"| {' | '.join(cells)} |")
    columns = ["command", "seconds", "goal on an idle machine"] + (["seconds before"] if len(homes) > 1 else [])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} when it began"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "optuna"))
    text = f"""# What looking costs

Written by `scripts/benchmark_startup.py`. Seconds from the start of a process to its end, median of {arguments.rounds}
rounds; all commands take turns. Python {platform.python_version()}, {versions}; {machine}. The study is
one of the digits ViT with 5 candidates. Importing torch and timm in the same rounds says how fast the machine was.

| {" | ".join(columns)} |
|{"---|" + "--:|" * (len(columns) - 1)}
"""
    (HOME / "benchmarks" / "startup.md").write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
