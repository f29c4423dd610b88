"""The scripts: executable, sound shell, and pinned versions that name no download address."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELL = ["scripts/quickstart", "scripts/test", "scripts/check", ".ci/run", "scripts/setup.sh"]


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_parse_and_can_be_run(name: str) -> None:
    path = ROOT / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert name.endswith(".sh") or os.access(path, os.X_OK)


def test_constraints_pin_versions_and_nothing_else() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    for file in ("constraints.txt", "pyproject.toml", "scripts/setup.sh"):
        assert "://" not in (ROOT / file).read_text()
