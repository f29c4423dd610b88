"""The layering of the house, and the light import: both are promises that are easy to break by accident."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "prunesearch"

# a module may import from its own tier and the ones after it
TIERS = (
    ("cli", "__main__"),
    ("report", "plot", "plot_sensitivity", "export", "freeze", "sources", "catalogue", "terminal"),
    ("search", "front"),
    ("space", "space_problems", "evaluate"),
    ("models", "presets"),
    ("cost",),
    ("tokens",),
    ("files", "json_schema", "yaml_text"),
    ("strict",),
    ("schedule",),
    ("config", "recipes", "registry", "plugins", "printable", "errors"),
)
ROOMS = {
    "timm": ("models", "evaluate", "catalogue"),
    "optuna": ("search.storage", "search.study", "search.samplers"),
    "ray": ("search.ray_workers", "search.tune"),
    "rich": ("report", "cli", "catalogue", "terminal"),
    "matplotlib": ("plot", "plot_sensitivity"),
    "sklearn": ("evaluate.digits", "search.surrogate", "search.token_gp"),
}
# front.py knows `Record`, schedule.py asks the registries in tokens/ when a schedule is resolved
UPWARD = {("schedule", "tokens")}


def modules() -> list[tuple[str, Path]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return [(name, path) for name, path in zip(names, paths, strict=True) if name != "__init__"]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "prunesearch"
                else {node.module}
            )
    return found


def tier(module: str) -> int:
    return next(index for index, names in enumerate(TIERS) if module.split(".")[0] in names)


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_down_only(name: str, path: Path) -> None:
    for other in imported(path):
        parts = other.split(".")
        if parts[0] == "prunesearch" and len(parts) > 1 and parts[1] != "__version__":
            allowed = tier(parts[1]) >= tier(name) or (name, parts[1]) in UPWARD
            assert allowed, f"{name} imports {other}, which is above it"


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_heavy_libraries_stay_in_their_rooms(name: str, path: Path) -> None:
    for other in imported(path):
        rooms = ROOMS.get(other.split(".")[0])
        assert rooms is None or any(name == room or name.startswith(f"{room}.") for room in rooms), (name, other)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'timm', 'ray', 'optuna', 'rich', 'sklearn', 'matplotlib', 'yaml'}"
    assert run(f"import sys, prunesearch, prunesearch.cli; print({heavy} & set(sys.modules))") == "set()"


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
