"""The arithmetic and the pages of scripts/benchmark_speed.py and scripts/benchmark_device_search.py."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from fake_profiles import fake_profile

from prunesearch.config import ModelConfig
from prunesearch.evaluate.shapes import model_shape
from prunesearch.files import save_schedule
from prunesearch.schedule import Schedule, Stage
from prunesearch.strict import to_mapping

SCRIPTS = Path(__file__).parents[2] / "scripts"
DIGITS = "vit_digits_patch1_8"
DROP = Schedule((Stage(2, keep=0.5),))


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_speed")


@pytest.fixture
def device_search(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_device_search")


def cell(speed: ModuleType, batch: int, runtime: str, *times: object):
    setting = speed.Setting("vit", runtime, batch, "a CPU", 2, "float32", 5.0, (("torch", "2"),), ("evit: drop",))
    return speed.Cell(setting, tuple(times), (speed.Failure("pool", "it cannot be exported"),))


def times_of(speed: ModuleType, dense: float = 100.0, pruned: float = 60.0) -> list:
    """The dense model, one token, and a schedule at half of the MACs."""
    return [
        speed.Time("dense", 4.0, dense, 0.0),
        speed.Time("one patch token", 1.0, 20.0, 0.0),
        speed.Time("evit", 2.0, pruned, 0.03),
    ]


def test_efficiency_is_speed_up_over_macs_reduction(speed: ModuleType) -> None:
    dense, floor, pruned = times_of(speed)
    assert speed.speed_up(dense, pruned) == pytest.approx(100 / 60) and speed.reduction(dense, pruned) == 2.0
    assert speed.efficiency(dense, pruned) == pytest.approx(100 / 60 / 2)
    # a third of the MACs above the floor's is left, so that the best time is 20 + 80 / 3 ms
    assert speed.allowed(dense, floor, pruned) == pytest.approx(100 / (20 + 80 / 3) / 2)


def test_goals_name_what_misses_them(speed: ModuleType) -> None:
    theirs = speed.Time("evit", 2.0, 57.0, 0.04, theirs=True)
    slow, fast = cell(speed, 16, "torch", *times_of(speed)), cell(speed, 16, "openvino", *times_of(speed, pruned=54.0))
    lines = "\n".join(speed.goal_lines([slow, fast, cell(speed, 1, "torch", *times_of(speed), theirs)]))
    assert "from batch 16 on: 1 of 2." in lines and "missed: vit, torch, batch 16, evit: 0.83; fixed parts" in lines
    assert "authors' code: 0 of 1." in lines  # 57 ms against 60 ms, with a standard error of 5 %
    assert "missed: vit, torch, batch 1, evit: 0.950 ± 0.048, which is within two standard errors" in lines


def test_the_best_runtime_is_chosen_by_ratios_of_one_run(speed: ModuleType) -> None:
    """The second run was made when the machine was twice as slow."""
    eager = speed.Time("dense, eager", 4.0, 200.0, 0.0)
    cells = [
        cell(speed, 1, "torch", *times_of(speed)),
        cell(speed, 1, "onnxruntime", *times_of(speed, dense=180.0, pruned=90.0), eager),
    ]
    chosen, dense, time = speed.best_runtime(cells, "evit")
    assert (chosen.setting.runtime, dense.ms, time.ms) == ("onnxruntime", 200.0, 90.0)
    assert speed.best_runtime(cells, "other") is None


def test_cells_are_kept_and_the_page_has_all_of_them(speed: ModuleType, tmp_path: Path) -> None:
    cells = [cell(speed, 1, "torch", *times_of(speed)), cell(speed, 16, "torch")]  # the second: even dense failed
    speed.save_cells(cells, tmp_path / "cells.json")
    assert speed.load_cells(tmp_path / "cells.json") == cells
    parsed = speed._parser().parse_args(["--out", str(tmp_path / "page.md")])
    text = speed.page(cells, replace_notes(parsed, tmp_path))
    for said in ("| evit | 2.00 | 60.0 ± 3.0% | 1.67 | 0.83 |", "could not be measured", "- pool: it cannot", "*Why*"):
        assert said in text


def replace_notes(parsed: argparse.Namespace, folder: Path) -> argparse.Namespace:
    parsed.notes = folder / "notes.md"
    parsed.notes.write_text("*Why*: rounding.")
    return parsed


def test_a_schedule_file_goes_to_the_model_of_its_shape(speed: ModuleType, tmp_path: Path) -> None:
    for name, model in (
        ("all", None),
        ("digits", {"name": DIGITS}),
        ("less", {"name": DIGITS, "options": {"depth": 4}}),
    ):
        save_schedule(DROP, tmp_path / f"{name}.yaml", model=model)
    files = [str(path) for path in sorted(tmp_path.glob("*.yaml"))]
    chosen = ["--models", DIGITS, "--presets", "evit-0.7", "asvit-0.5", "--schedules", *files]
    works = list(speed.works_of(speed._parser().parse_args([*chosen, "--out", "page.md"])))
    assert [list(work.schedules) for work in works] == [["evit-0.7", "all", "digits"], ["less"]]
    assert [failure.name for failure in works[0].failures] == ["asvit-0.5"] and "freeze" in works[0].failures[0].why


def test_ratios_of_two_profiles(device_search: ModuleType) -> None:
    idle = fake_profile(model_shape(ModelConfig(DIGITS)))
    slower = replace(idle, fixed=idle.fixed * 2)
    assert device_search.differences([DROP], idle, idle) == [0.0]
    (difference,) = device_search.differences([DROP], idle, slower)
    before, after = (device_search.share_of_dense(idle.shape, DROP, profile) for profile in (idle, slower))
    assert difference == pytest.approx(after / before - 1) and difference > 0


def test_fronts_are_compared_by_schedules_and_metrics(device_search: ModuleType) -> None:
    rows = [
        {"schedule": to_mapping(Schedule((Stage(2, keep=keep),))), "metrics": {"top1": keep}} for keep in (0.5, 0.7)
    ]
    other = json.loads(json.dumps(rows))
    assert device_search.is_same_front(rows, other) and device_search.same_schedules(rows, other) == 2
    other[0]["metrics"]["top1"] = 0.4
    assert not device_search.is_same_front(rows, other) and device_search.same_schedules(rows, other) == 2
    assert not device_search.is_same_front(rows, rows[:1]) and device_search.same_schedules(rows, rows[:1]) == 1


def test_the_page_marks_goals_that_are_missed(device_search: ModuleType, tmp_path: Path) -> None:
    idle = replace(fake_profile(model_shape(ModelConfig(DIGITS))), versions=(("torch", "2"),))
    metrics = {"agreement": 98.0, "top1": 97.0, "predicted_latency_ms": 5.0}
    row = {"schedule": to_mapping(DROP), "metrics": metrics}
    study = device_search.Study("digits", tmp_path / "digits.yaml", (), 16)
    points = [device_search.Point(DROP, metrics, 2.0, measured) for measured in (1.9, 1.5)]
    names = (device_search.IDLE, device_search.LOADED, device_search.OTHER)
    fronts, seconds = {name: [row] for name in names}, dict.fromkeys(names, 3.0)
    result = device_search.Result(study, idle, idle, 1, [0.02, -0.04], fronts, seconds, points, 9.0, "")
    first, second, third = device_search.goal_rows(result)
    assert first.endswith("the same, 1 points | yes |") and second.endswith("median 3.0%, largest 4.0% | yes |")
    assert third.endswith("median 19.3%, largest 33.3% | **no** |")
    assert "| 2 drop 0.5 | 98.00 | 97.00 | 5.00 | 2.00 | 1.50 | +33.3% |" in device_search.section(result)
