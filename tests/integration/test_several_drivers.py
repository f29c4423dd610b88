"""Several drivers on one study: no candidate twice, nothing lost, candidates of dead drivers are taken over."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from driving import drivers, end, evaluated, fake_search, read, start, wait_for
from postgres import Server, Unavailable, postgres
from test_compare_and_swap import RECORD, SITUATIONS, WRITES, late_write, race

from prunesearch.study.store import open_store


def a_server() -> Iterator[Server]:
    try:
        with postgres() as server:
            yield server
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
        return
    yield from (server.url for server in a_server())


@pytest.mark.slow
def test_two_drivers_share_two_hundred_candidates(tmp_path: Path, url: str) -> None:
    config = fake_search.study(200, "tpe")
    end(*(start(tmp_path / name, url, config) for name in ("one", "two")))
    found = read(url)
    assert len(found) == len({record.uid for record in found}) == 200
    assert {record.state for record in found} == {"complete"}
    assert evaluated(tmp_path).total() == len(evaluated(tmp_path)) == 200, "an evaluation was made twice"
    assert drivers(tmp_path) == 2


@pytest.mark.slow
def test_three_drivers_share_promotions(tmp_path: Path, url: str) -> None:
    config = fake_search.small_study(60, space=fake_search.SPACE)
    end(*(start(tmp_path / name, url, config) for name in ("one", "two", "three")))
    found = read(url)
    assert len(found) == 60 and {record.state for record in found} == {"complete", "paused"}
    begun = evaluated(tmp_path)
    assert begun.total() == len(begun) == sum(len(record.evaluations) for record in found)
    assert drivers(tmp_path) == 3


@pytest.mark.slow
def test_what_a_dead_driver_ran_is_taken_over(tmp_path: Path, url: str) -> None:
    config = fake_search.study(12)
    dying, other = (start(tmp_path / name, url, config, seconds=0.5) for name in ("dying", "other"))
    wait_for(tmp_path, 4)
    dying.kill()
    end(other)
    found = read(url)
    assert len(found) == 12 and {record.state for record in found} == {"complete"}
    begun = evaluated(tmp_path)
    assert len(begun) == 12 and begun.total() <= 13, "only what was cut short is evaluated again"


@pytest.mark.slow
def test_one_folder_serves_several(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared' / 'study.db'}"
    config = fake_search.study(30)
    end(*(start(tmp_path / "shared", url, config) for _ in range(3)))
    assert len(read(url)) == 30 and evaluated(tmp_path).total() == 30


@pytest.fixture
def server() -> Iterator[Server]:
    yield from a_server()


@pytest.mark.slow
def test_a_database_that_goes_away_is_waited_for(tmp_path: Path, server: Server) -> None:
    process = start(tmp_path / "one", server.url, fake_search.study(20), seconds=0.2)
    wait_for(tmp_path, 5)
    server.stop()
    time.sleep(6)
    server.start()
    end(process)
    found = read(server.url)
    assert len(found) == 20 and {record.state for record in found} == {"complete"}
    assert evaluated(tmp_path).total() == 20


@pytest.mark.slow
def test_of_late_and_simultaneous_writes_the_first_one_counts(url: str) -> None:
    stores = [
        open_store(fake_search.small_study(9), url, owner=name, alone=False) for name in ("late", "second", "third")
    ]
    for number, (situation, write) in enumerate(itertools.product(SITUATIONS, WRITES)):
        late_write(replace(RECORD, uid=f"late {number}"), stores, situation, write)
    for write in ("begin", "take over", "promote"):
        race(replace(RECORD, uid=write), stores, write)
    for store in stores:
        store.close()


@pytest.mark.slow
@pytest.mark.timeout(900)  # each start of a driver takes seconds
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_kills_of_any_driver_lose_and_repeat_nothing(database: str) -> None:
    """The whole matrix: python scripts/kill_matrix.py"""
    script = Path(__file__).parents[2] / "scripts" / "kill_matrix.py"
    size = ["--runs", "1", "--candidates", "30", "--drivers", "3", "--kills", "3"]
    if database == "postgres":
        next(a_server(), None)  # skips without PostgreSQL
    done = subprocess.run([sys.executable, str(script), "--databases", database, *size], capture_output=True, text=True)
    assert done.returncode == 0 and "; 0 lost, 0 repeated;" in done.stdout, done.stdout + done.stderr
