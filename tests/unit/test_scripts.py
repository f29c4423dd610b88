"""The scripts: executable, sound shell, and pinned versions that name no download address."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from prunesearch.cli import _parser

ROOT = Path(__file__).parents[2]
SHELL = [
    "scripts/quickstart",
    "scripts/test",
    "scripts/test_oldest",
    "scripts/check",
    ".ci/run",
    "scripts/setup.sh",
    "scripts/slurm.sh",
]


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_parse_and_can_be_run(name: str) -> None:
    path = ROOT / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert name.endswith(".sh") or os.access(path, os.X_OK)


def test_the_kuberay_manifest_is_a_job_whose_command_exists() -> None:
    with (ROOT / "docs" / "kuberay.yaml").open() as file:
        parts = {part["kind"]: part for part in yaml.safe_load_all(file)}
    program, *arguments = shlex.split(parts["RayJob"]["spec"]["entrypoint"])
    parsed = _parser().parse_args(arguments)
    assert program == "prunesearch" and parsed.set == ["workers.address=auto"]
    assert parsed.storage.startswith("sqlite:////database/")  # not on the shared disk


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_pin_versions_and_nothing_else(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    for file in (name, "pyproject.toml", "scripts/setup.sh"):
        assert "://" not in (ROOT / file).read_text()


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """What pyproject.toml promises is what is tested, major and minor version at least."""
    bounds = dict(re.findall(r'"([a-z-]+)(?:\[[a-z]+\])?>=([0-9.]+)', (ROOT / "pyproject.toml").read_text()))
    pins = dict(re.findall(r"^([a-z-]+)==([0-9.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    for name in (
        "torch",
        "timm",
        "pyyaml",
        "safetensors",
        "numpy",
        "optuna",
        "rich",
        "scikit-learn",
        "scipy",
        "matplotlib",
    ):
        assert pins[name].split(".")[: len(bounds[name].split("."))] == bounds[name].split("."), name
