"""What importing the package loads: nothing heavy, and for a deployed model torch, timm and yaml only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'timm', 'ray', 'optuna', 'rich', 'sklearn', 'matplotlib', 'yaml'}"
    assert run(f"import sys, prunesearch, prunesearch.cli; print({heavy} & set(sys.modules))") == "set()"


def test_a_list_of_samplers_loads_nothing_that_they_use() -> None:
    heavy = "{'torch', 'optuna', 'sklearn', 'scipy', 'numpy'}"
    code = (
        f"import sys; from prunesearch.samplers import SAMPLERS; print(len(SAMPLERS) > 5, {heavy} & set(sys.modules))"
    )
    assert run(code) == "True set()"


def test_applying_a_schedule_needs_torch_timm_and_yaml_only(tmp_path: Path) -> None:
    """What a deployed model imports, in a process where everything else of ours is missing."""
    (tmp_path / "best.yaml").write_text("version: 1\nstages: [{block: 1, keep: 0.5, reduce: squeeze}]\n")
    output = run(
        f"""
import sys
for name in ("ray", "optuna", "rich", "sklearn", "scipy", "matplotlib", "pydantic", "sqlalchemy"):
    sys.modules[name] = None  # importing it is an error, looking for it finds nothing
import timm, torch
from prunesearch import apply_schedule, estimate_cost, load_schedule, shape_of
model = timm.create_model("test_vit").eval()
schedule = load_schedule({str(tmp_path / "best.yaml")!r})
before = estimate_cost(shape_of(model)).macs
after = estimate_cost(shape_of(model), schedule).macs
print(apply_schedule(model, schedule)(torch.zeros(1, 3, 160, 160)).shape, after < before)
"""
    )
    assert output == "torch.Size([1, 1000]) True"


def test_every_public_name_is_there() -> None:
    import prunesearch

    for name in prunesearch.__all__:
        assert getattr(prunesearch, name) is not None and name in dir(prunesearch)
    with pytest.raises(AttributeError, match="aply_schedule"):
        prunesearch.aply_schedule  # noqa: B018
