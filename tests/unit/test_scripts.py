"""The scripts: executable, sound shell, and pinned versions that name no download address."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from prunesearch.cli import _parser

ROOT = Path(__file__).parents[2]
SHELL = ["scripts/quickstart", "scripts/test", "scripts/check", ".ci/run", "scripts/setup.sh", "scripts/slurm.sh"]


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


def test_constraints_pin_versions_and_nothing_else() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    for file in ("constraints.txt", "pyproject.toml", "scripts/setup.sh"):
        assert "://" not in (ROOT / file).read_text()
