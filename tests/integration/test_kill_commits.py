"""Kill a driver at any of its SQLite transactions: nothing is lost or evaluated twice."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_search import small_study
from sqlalchemy import Engine, event

from prunesearch.search.driver import run_study
from prunesearch.study.reader import open_study_readonly

CONFIG = small_study(5, "random")
KILLED = 9


@contextmanager
def counted(what: str, fatal: int | None = None) -> Iterator[Counter[str]]:
    """Count transactions at their begin ("begin") or before their commit ("commit").

    The process exits at number `fatal`, as if it was killed.
    """
    times: Counter[str] = Counter()

    def happen(_: Any) -> None:
        times[what] += 1
        if times[what] == fatal:
            os._exit(KILLED)

    event.listen(Engine, what, happen)
    try:
        yield times
    finally:
        event.remove(Engine, what, happen)


def run(folder: Path) -> None:
    run_study(CONFIG, folder, evaluate="fake_search:evaluate_and_note")


def found_in(folder: Path) -> list[tuple[str, object]]:
    reader = open_study_readonly(folder)
    try:
        return [(record.uid, [(one.rung, one.metrics) for one in record.evaluations]) for record in reader.records()]
    finally:
        reader.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[str, object]], dict[str, int]]:
    """The result of a run without a kill, and the number of its begins and commits."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, counted("begin") as begun, counted("commit") as committed:
        patch.setenv("FAKE_LEDGER", str(folder / "ledger"))
        run(folder)
    return found_in(folder), {**begun, **committed}


SOME = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("what", "places"),
    [
        pytest.param("begin", SOME, marks=pytest.mark.slow),
        ("commit", SOME),
        *(pytest.param("commit", place, marks=pytest.mark.slow) for place in range(10)),
    ],
)
def test_a_kill_at_a_transaction_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[list[tuple[str, object]], dict[str, int]],
    what: str,
    places: tuple[float, ...] | int,
) -> None:
    """places: shares of the transactions of a whole run; or an integer N: all transactions whose number ends in N."""
    expected, times = whole
    if isinstance(places, int):
        fatal = [number for number in range(1, times[what] + 1) if number % 10 == places]
    else:
        fatal = [1 + int(share * times[what]) for share in places]
    for number in fatal:
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.setenv("FAKE_LEDGER", str(folder / "ledger"))
        child = os.fork()
        if child == 0:
            with counted(what, number):
                run(folder)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
        run(folder)
        assert found_in(folder) == expected
        evaluated = Counter((folder / "ledger").read_text().split())
        assert evaluated == Counter(uid for uid, evaluations in expected for _ in evaluations)  # type: ignore[attr-defined]
