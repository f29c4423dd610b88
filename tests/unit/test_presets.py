"""Presets by name and their rules; counts and MACs against papers are in tests/contract/test_published.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_schedule import shape

from prunesearch.errors import FileError, ScheduleError, UnknownNameError
from prunesearch.files import PRESETS, PresetFile, PresetStage, load_schedule_file, save_schedule
from prunesearch.presets import find_schedule, load_preset, presets
from prunesearch.presets.rule import fit
from prunesearch.schedule import Schedule, Stage, resolve

FOR_MAPS = ("dynswin", "dynconvnext")
"""Presets for models with a feature map."""


def fitted(*stages: PresetStage, patch_tokens: int = 64, depth: int = 4) -> tuple[Stage, ...]:
    preset = PresetFile(1, summary="", source="", stages=stages, depth=depth, patch_tokens=patch_tokens)
    return fit("mine", preset, shape(patch_tokens, depth)).stages


@pytest.mark.parametrize("name", presets())
def test_every_preset_says_where_it_comes_from(name: str) -> None:
    assert presets()[name].source
    assert 0 < len(presets()[name].summary) <= 50  # `prunesearch list presets` on one line of 100 columns
    for row in presets()[name].published:
        assert {"model", "top1", "trained"} <= set(row) <= {"model", "gmacs", "top1", "trained"}
    said = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    assert "\n# Counts: " in said or "\n# Thresholds: " in said
    assert ("No published numbers" in said) == (not presets()[name].published)


@pytest.mark.parametrize("name", [name for name in presets() if not name.startswith(("diffrate", *FOR_MAPS))])
def test_rules_fit_other_depths_and_sizes(name: str) -> None:
    for depth, tokens in ((12, 196), (24, 196), (12, 576), (8, 64)):
        assert resolve(load_preset(name, shape(tokens, depth)), shape(tokens, depth))


def test_searched_counts_fit_one_shape() -> None:
    assert resolve(load_preset("diffrate-s-2.9", shape()), shape())
    for other in (shape(depth=24), shape(576)):
        with pytest.raises(ScheduleError, match=r"diffrate-s-2\.9: its counts were searched for 12 blocks and 196 p"):
            load_preset("diffrate-s-2.9", other)


def test_stages_keep_their_place_in_the_depth() -> None:
    assert [stage.block for stage in load_preset("evit-0.7", shape(depth=24)).stages] == [6, 12, 18]
    assert [stage.block for stage in load_preset("evit-0.7", shape(depth=8)).stages] == [2, 4, 6]
    assert [stage.block for stage in load_preset("asvit-0.65", shape(depth=12)).stages] == [4, 7, 10]
    for depth in (1, 2):  # with 2 blocks the last stage would be after the last block
        with pytest.raises(ScheduleError, match="fall on the same blocks"):
            load_preset("evit-0.7", shape(depth=depth))


def test_keep_of_original_rounds_down_exactly() -> None:
    row = PresetStage(1, keep_of_original=0.29)
    assert [fitted(row, patch_tokens=n)[0].tokens for n in (99, 100, 101)] == [28, 29, 29]  # 0.29 x 100 < 29 in floats


def test_remove_takes_what_the_verb_can_give() -> None:
    merge = PresetStage(remove=16, reduce="merge")
    assert [stage.tokens for stage in fitted(merge, depth=8)] == [48, 32, 16, 8, 4, 2, 1]
    drop = PresetStage(remove=16, score="class_attention")
    assert [stage.tokens for stage in fitted(drop)] == [48, 32, 16, 1]


def test_remove_last_is_a_line_over_the_depth() -> None:
    row = PresetStage(remove=8, remove_last=0, reduce="merge")
    assert [stage.tokens for stage in fitted(row)] == [56, 51, 49]  # 8, 5.33, 2.67 and 0


def test_a_count_above_what_arrives_is_no_stage() -> None:
    drop = PresetStage(score="class_attention", tokens=(64, 50, 55, 10))
    absorb = PresetStage(score="class_attention", tokens=(60, 60, 40, 10), reduce="absorb")
    found = [(stage.block, stage.reduce, stage.tokens) for stage in fitted(drop, absorb)]
    assert found == [(0, "absorb", 60), (1, "drop", 50), (2, "absorb", 40), (3, "drop", 10)]


def test_a_preset_that_would_do_nothing_says_so() -> None:
    assert load_preset("patchmerger-8", shape(9)).stages
    with pytest.raises(ScheduleError, match="it removes nothing from 8 patch tokens"):
        load_preset("patchmerger-8", shape(8))


def test_presets_of_models_with_and_without_a_map_refuse_each_other() -> None:
    of_map = replace(shape(196, 18), prefix_tokens=0, class_tokens=0, holds=True)
    with pytest.raises(ScheduleError, match=r"dynswin-0\.7: it is for models with a feature map"):
        load_preset("dynswin-0.7", shape())
    with pytest.raises(ScheduleError, match="it is for models whose tokens can go"):
        load_preset("evit-0.7", of_map)
    stages = [(stage.block, stage.tokens) for stage in load_preset("dynswin-0.7", of_map).stages]
    assert stages == [(2, 137), (4, 98), (6, 58)]
    with pytest.raises(ScheduleError, match="fall on the same blocks"):  # places in Swin-T are no shares of the depth
        load_preset("dynswin-0.7", replace(of_map, depth=6))


def test_find_schedule_takes_names_and_files(tmp_path: Path) -> None:
    schedule = Schedule((Stage(2, keep=0.5),))
    save_schedule(schedule, tmp_path / "mine.yaml")
    assert find_schedule(str(tmp_path / "mine.yaml"), shape()) == schedule
    assert find_schedule("evit-0.7", shape()) == load_preset("evit-0.7", shape())
    with pytest.raises(UnknownNameError, match='Did you mean "evit-0'):
        find_schedule("evit0.7", shape())


def test_a_model_takes_a_preset_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    from prunesearch.models import apply_schedule, schedule_of, shape_of

    model = timm.create_model("vit_digits_patch1_8")
    apply_schedule(model, "tome-r13")
    assert schedule_of(model) == load_preset("tome-r13", shape_of(model))
    with pytest.raises(FileError, match=r"is a preset, not a file. In Python: apply_schedule\(model, .tome-r13.\)"):
        load_schedule_file("tome-r13")
    with pytest.raises(FileError, match="there is no such file"):
        apply_schedule(model, "somewhere/mine.yaml")
    for typo in ("tome-r131", "ToMe-r13"):
        with pytest.raises(FileError, match=r"nor a preset of that name\. Did you mean .tome-r13"):
            apply_schedule(model, typo)
    with pytest.raises(FileError, match=r"Did you mean the preset .tome-r13.\?"):
        apply_schedule(model, "tome-r13.yaml")
    with pytest.raises(FileError, match="cannot be read as text"):
        apply_schedule(model, "a" * 5000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evit-0.7").mkdir()
    assert schedule_of(apply_schedule(model, "evit-0.7")) == load_preset("evit-0.7", shape_of(model)), "not a folder"
    save_schedule(Schedule(), "tome-r13")
    assert schedule_of(apply_schedule(model, "tome-r13")) == Schedule(), "a file of that name comes first"
