"""Published schedules by name; their counts and MACs are in tests/contract/test_cost.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_schedule import shape

from prunesearch.errors import ScheduleError, UnknownNameError
from prunesearch.files import save_schedule
from prunesearch.presets import find_schedule, load_preset, presets
from prunesearch.schedule import Schedule, Stage, resolve


@pytest.mark.parametrize("name", presets())
def test_every_preset_says_where_it_comes_from_and_fits(name: str) -> None:
    assert presets()[name].source and presets()[name].published
    for depth, tokens in ((12, 196), (24, 196), (12, 576), (8, 64)):
        assert resolve(load_preset(name, shape(tokens, depth)), shape(tokens, depth))


def test_stages_keep_their_place_in_the_depth() -> None:
    assert [stage.block for stage in load_preset("evit-0.7", shape(depth=24)).stages] == [6, 12, 18]
    assert [stage.block for stage in load_preset("evit-0.7", shape(depth=8)).stages] == [2, 4, 6]
    with pytest.raises(ScheduleError, match="fall on the same blocks"):
        load_preset("evit-0.7", shape(depth=1))


def test_tome_merges_in_every_block_and_at_most_half() -> None:
    after = [step.after for step in resolve(load_preset("tome-r16", shape(64)), shape(64))]
    assert after == [48, 32, 16, 8, 4, 2, 1]


def test_find_schedule_takes_names_and_files(tmp_path: Path) -> None:
    schedule = Schedule((Stage(2, keep=0.5),))
    save_schedule(schedule, tmp_path / "mine.yaml")
    assert find_schedule(str(tmp_path / "mine.yaml"), shape()) == schedule
    assert find_schedule("evit-0.7", shape()) == load_preset("evit-0.7", shape())
    with pytest.raises(UnknownNameError, match='Did you mean "evit-0'):
        find_schedule("evit0.7", shape())
