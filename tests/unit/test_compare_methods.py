"""scripts/compare_methods.py: rows measured again replace theirs in a page, with a mark; the rest is unchanged."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["methods_digits.md", "methods_cifar10.md"]
DAY = date(2026, 11, 25)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_methods", ROOT / "scripts" / "compare_methods.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["compare_methods"] = importlib.util.module_from_spec(spec)  # dataclasses looks the module up
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    return (ROOT / "benchmarks" / name).read_text(encoding="utf-8")


def unmarked(name: str) -> str:
    """The page without marks, as if all rows were of the first run."""
    lines = [line for line in page(name).splitlines(keepends=True) if not line.startswith("Rows marked ")]
    return "".join(re.sub(r"^\| ([^|*]+)\*+ \|", r"| \1 |", line) for line in lines)


def row(script: ModuleType, name: str, share: float, *finetuned: float):
    return script.Row(name, share, [50.0], list(finetuned), [share + 0.01])


@pytest.mark.parametrize("name", PAGES)
def test_rows_of_the_kept_pages_are_read_and_written_alike(script: ModuleType, name: str) -> None:
    written = [
        text for text in page(name).splitlines() if "% |" in text and "covered" not in text and "of 64" not in text
    ]
    assert len(written) > 15
    for text in written:
        assert str(script.read_line(text)) == text


@pytest.mark.parametrize("name", PAGES)
def test_what_follows_from_the_table_is_what_the_page_says(script: ModuleType, name: str) -> None:
    lines = [script.read_line(text) for text in page(name).splitlines() if script.LINE.fullmatch(text)]
    for text in script.expectations(lines):
        assert text in page(name)


@pytest.mark.parametrize("name", PAGES)
def test_a_row_measured_anew_takes_its_place(script: ModuleType, name: str) -> None:
    before = unmarked(name)
    rows = [row(script, "DynamicViT", 0.7, 99.0, 99.2), row(script, "dTPS", 0.5, 1.0)]
    after, lines = script.put_into(before, rows, 5, DAY, "python …")
    assert "| DynamicViT* | 71.0% | 50.00 | 99.10 ± 0.14 |" in after and "| dTPS* | 51.0% | 50.00 | 1.00 |" in after
    assert "Rows marked * were measured anew on 2026-11-25 with 5 seeds: `python …`." in after
    assert "DynamicViT beats random drop at 0.7: holds (99.10 against" in after
    assert "dTPS beats random drop at 0.5: does not hold here (1.00 against" in after
    changed = set(before.splitlines()) ^ set(after.splitlines())
    assert all(any(word in text for word in ("DynamicViT", "dTPS", "Rows marked")) for text in changed)
    assert len(lines) == sum(script.LINE.fullmatch(text) is not None for text in before.splitlines())
    assert after.partition("\nWhy,")[2] == before.partition("\nWhy,")[2]


def test_later_runs_have_marks_of_their_own(script: ModuleType) -> None:
    once, _ = script.put_into(unmarked(PAGES[0]), [row(script, "LTMP", 0.7, 9.0)], 5, DAY, "one")
    twice, _ = script.put_into(once, [row(script, "LTMP", 0.5, 8.0)], 3, date(2027, 1, 2), "two")
    assert "| LTMP* | 71.0% " in twice and "| LTMP** | 51.0% " in twice
    assert "Rows marked * were measured anew on 2026-11-25 with 5 seeds: `one`." in twice
    assert "Rows marked ** were measured anew on 2027-01-02 with 3 seeds: `two`." in twice


def test_a_mark_without_rows_goes_and_the_later_ones_move_up(script: ModuleType) -> None:
    text = unmarked(PAGES[0])
    for number, share in enumerate([0.7, 0.5, 0.7]):
        text, lines = script.put_into(text, [row(script, "LTMP", share, 9.0)], 5, DAY, f"run {number}")
    assert [line.mark for line in lines if line.mark] == ["**", "*"]
    notes = [line for line in text.splitlines() if line.startswith("Rows marked ")]
    assert [note.split()[2] for note in notes] == ["*", "**"]
    assert "`run 1`" in notes[0] and "`run 2`" in notes[1]


def test_a_row_that_the_page_lacks_goes_behind_those_of_its_share(script: ModuleType) -> None:
    after, lines = script.put_into(unmarked("methods_cifar10.md"), [row(script, "LTMP", 0.7, 60.0)], 5, DAY, "c")
    names = [(line.name, line.share) for line in lines]
    assert names.index(("LTMP", 0.7)) == names.index(("AS-ViT", 0.7)) + 1
    assert "- LTMP beats random drop at 0.7: does not hold here (60.00 against" in after


def test_a_page_of_something_else_is_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no table of this script"):
        script.put_into("# Something else\n", [], 5, DAY, "c")


def test_names_may_have_commas(script: ModuleType) -> None:
    assert script._names("DynamicViT,EViT, fuse,dTPS, dense") == ["DynamicViT", "EViT, fuse", "dTPS", "dense"]
    for method in script.METHODS:
        assert script._names(method.name) == [method.name]
    with pytest.raises(argparse.ArgumentTypeError, match=r"'dtps' begins with no method\. Possible: AS-ViT; .*dTPS"):
        script._names("DynamicViT,dtps")
    with pytest.raises(argparse.ArgumentTypeError, match=r"possible: 0\.7, 0\.5"):
        script._shares("0.6")


def test_every_method_has_a_schedule_near_its_share(script: ModuleType) -> None:
    """On the shape of the digits model, also for methods with options."""
    from prunesearch.cost import estimate_cost
    from prunesearch.evaluate import model_shape
    from prunesearch.files import load_study

    shape = model_shape(load_study(ROOT / "search_spaces" / "digits_predictor.yaml").model)
    for method in script.METHODS:
        for share in script.SHARES:
            schedule = script.at_share(method, shape, share)
            assert schedule is not None and schedule.stages
            if not schedule.is_adaptive:
                assert estimate_cost(shape, schedule).macs / estimate_cost(shape).macs == pytest.approx(share, abs=0.07)
