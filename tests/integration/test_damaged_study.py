"""Damaged stored data: a bad trial is left out, bad data of the whole study is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from fake_search import study

from prunesearch.cli import main
from prunesearch.config import ConfirmConfig, StopConfig
from prunesearch.errors import PruneSearchError
from prunesearch.evaluate.task import Evaluation
from prunesearch.search.driver import run_study
from prunesearch.strict import to_mapping
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.storage import storage_url
from prunesearch.study.store import open_store

Damage = Callable[[Path, int], None]
"""Damages a trial, given the study folder and the trial's number."""
TRIALS = 45
CONFIG = study(TRIALS)
GOOD = 3
"""This many trials are not damaged. Each of the others is damaged in a different way."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "fake"
    run_study(CONFIG, folder, evaluate="fake_search:evaluate")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "fake"))


def change(folder: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / "study.db")) as connection:
        assert connection.execute(statement, values).rowcount > 0, "the test damages nothing"
        connection.commit()


def set_attribute(folder: Path, number: int, key: str, text: str | None) -> None:
    """Replace the JSON of an attribute by a text, or delete the attribute."""
    of_trial = "trial_id = (SELECT trial_id FROM trials WHERE number = ?) AND key = ?"
    if text is None:
        change(folder, f"DELETE FROM trial_user_attributes WHERE {of_trial}", number, key)
    else:
        change(folder, f"UPDATE trial_user_attributes SET value_json = ? WHERE {of_trial}", text, number, key)


def with_evaluation(folder: Path, number: int, **changes: object) -> None:
    record = next(record for record in open_study_readonly(folder).records() if record.number == number)
    set_attribute(folder, number, "rung:0", json.dumps({**to_mapping(record.evaluation), "order": number, **changes}))


def of_trial(statement: str) -> Damage:
    return lambda folder, number: change(
        folder, f"{statement} trial_id = (SELECT trial_id FROM trials WHERE number = ?)", number
    )


def attribute(key: str, text: str | None) -> Damage:
    return lambda folder, number: set_attribute(folder, number, key, text)


def evaluation(**changes: object) -> Damage:
    return lambda folder, number: with_evaluation(folder, number, **changes)


def more_attempts_than_rungs(folder: Path, number: int) -> None:
    of_trial("DELETE FROM trial_user_attributes WHERE key = 'rung:0' AND")(folder, number)
    of_trial("UPDATE trials SET state = 'RUNNING' WHERE")(folder, number)
    set_attribute(folder, number, "attempts", "[1, 1]")


ATTRIBUTES = ["uid", "schedule", "origin", "seed", "owner", "attempts", "rung:0"]
TEXTS = {"a mapping": '{"a": 1}', "lists": "[[[]]]", "null": "null"}
UNREADABLE = {"no JSON": "{oops", "deep": "[" * 100_000 + "]" * 100_000}
BLOCK = {"stages": [{"block": 99, "keep": 0.5}]}
OURS: dict[str, Damage] = {
    **{f"{key}: {name}": attribute(key, text) for key in ATTRIBUTES for name, text in TEXTS.items()},
    # studies of versions before several drivers have no owner
    **{f"{key}: missing": attribute(key, None) for key in ATTRIBUTES if key != "owner"},
    "nothing of ours": of_trial("DELETE FROM trial_user_attributes WHERE"),
    "a rung of no number": of_trial("UPDATE trial_user_attributes SET key = 'rung:x' WHERE key = 'rung:0' AND"),
    "a rung too many": of_trial("UPDATE trial_user_attributes SET key = 'rung:7' WHERE key = 'rung:0' AND"),
    "more attempts than rungs": more_attempts_than_rungs,
    "a metric that is missing": evaluation(metrics={"gmacs": 0.01}),
    "a metric that is text": evaluation(metrics={"gmacs": 0.01, "top1": "good"}),
    "a metric that is NaN": evaluation(metrics={"gmacs": 0.01, "top1": float("nan")}),
    "a status that is none": evaluation(status="fine"),
    "an order that is none": evaluation(order=True),
    "another rung": evaluation(rung=1),
    "a field from elsewhere": evaluation(accuracy=3),
    "an impossible block": attribute("schedule", json.dumps(BLOCK)),
    "an impossible block that was learned": evaluation(schedule=BLOCK),
}
OPTUNAS: dict[str, Damage] = {
    **{f"{key}: {name}": attribute(key, text) for key in ATTRIBUTES for name, text in UNREADABLE.items()},
    "a state that is none": of_trial("UPDATE trials SET state = 'XYZ' WHERE"),
    "a distribution that is none": of_trial("UPDATE trial_params SET distribution_json = '{}' WHERE"),
}


@pytest.mark.parametrize("damages", [OURS, OPTUNAS], ids=["what we read", "what Optuna reads"])
def test_damaged_trials_are_left_out_and_counted(
    folder: Path,
    damages: dict[str, Damage],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = dict(zip(damages, range(GOOD, TRIALS), strict=False))
    assert len(bad) == len(damages)
    expected = [record for record in open_study_readonly(folder).records() if record.number not in bad.values()]
    for name, number in bad.items():
        damages[name](folder, number)
    reader = open_study_readonly(folder)
    assert reader.records() == expected
    assert [name for name, number in bad.items() if number not in reader.unreadable] == []
    assert reader.unreadable.keys() == set(bad.values())
    caplog.clear()
    assert reader.records() == expected
    assert not caplog.records  # logged once only
    reader.close()
    assert main(["status", str(folder), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"study": "fake", "complete": len(expected), "unreadable": len(bad)}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(bad)
    assert all(warning.startswith("trial ") and warning.endswith("; it is left out") for warning in warnings)
    for verb in ("status", "front"):
        assert main([verb, str(folder)]) == 0
        assert f"{len(bad)} trials could not be read and are left out: {GOOD}, " in capsys.readouterr().err
    total = len(expected) + 2
    done = run_study(replace(CONFIG, stop=StopConfig(trials=total)), folder, evaluate="fake_search:evaluate")
    assert (done.reason, done.complete, done.failed, done.running) == ("trials", total, 0, 0)


def test_ninety_nine_good_trials_and_one_bad_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_attribute(folder, 7, "uid", "{oops")
    assert main(["front", str(folder)]) == 0
    assert "note: 1 trial could not be read and is left out: 7" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [attribute("uid", "{oops"), attribute("rung:0", "{}"), OURS["nothing of ours"]])
def test_several_drivers_go_on_beside_a_damaged_trial(folder: Path, damage: Damage) -> None:
    """They count candidates and search for equal ones in the database."""
    damage(folder, 1)
    config = replace(CONFIG, stop=StopConfig(trials=TRIALS + 1))
    done = run_study(config, folder, storage=storage_url(folder), evaluate="fake_search:evaluate")
    assert (done.reason, done.complete) == ("trials", TRIALS + 1)


def test_foreign_parameters_are_read_from_the_schedule(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    keep = "param_name = 'block1.keep' AND"
    of_trial(f"UPDATE trial_params SET param_name = 'foreign' WHERE {keep}")(folder, 5)
    of_trial(f"UPDATE trial_params SET param_value = 17.5 WHERE {keep}")(folder, 6)
    of_trial(f"DELETE FROM trial_params WHERE {keep}")(folder, 7)
    config = replace(CONFIG, stop=StopConfig(trials=TRIALS + 2))
    run_study(config, folder, evaluate="fake_search:evaluate")
    assert [number for number in range(TRIALS) if f"trial {number}: its parameters are not used" in caplog.text] == [
        5,
        6,
        7,
    ]
    run_study(config, other, evaluate="fake_search:evaluate")
    found, expected = open_study_readonly(folder).records(), open_study_readonly(other).records()
    assert [record.uid for record in found] == [record.uid for record in expected]


@pytest.mark.parametrize("text", [*TEXTS.values(), *UNREADABLE.values()], ids=[*TEXTS, *UNREADABLE])
def test_damaged_data_of_a_study_is_refused_by_name_or_left_out(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `config` nothing can be read, and without `starts` nothing can run. Other attributes are ignored."""
    config, url = study(2), storage_url(tmp_path / "fake")
    run_study(config, tmp_path / "fake", evaluate="fake_search:evaluate")
    store = open_store(config, url)
    uid = store.records()[0].uid
    for key in ("first", "driver:x", f"confirm:{uid}:0", f"confirm:{uid}:x"):
        store._storage.set_study_user_attr(store._study_id, key, "new")
    store.close()
    for key in ("first", "driver:x", f"confirm:{uid}:0", f"confirm:{uid}:x", "starts", "config"):
        folder = Path(shutil.copytree(tmp_path / "fake", tmp_path / key.partition(":")[0], dirs_exist_ok=True))
        change(folder, "UPDATE study_user_attributes SET value_json = ? WHERE key = ?", text, key)
        can_look = text in TEXTS.values() and key != "config"
        can_run = can_look and (key != "starts" or text == "null")  # null: stored when the settings were corrected
        for verb in ("status", "front"):
            assert main([verb, str(folder)]) in ((0,) if can_look else (1, 2))
            said = capsys.readouterr().err
            assert "Traceback" not in said and (can_look or "fake" in said or "study.db" in said)
        more = replace(config, stop=StopConfig(trials=3))
        if can_run:
            assert run_study(more, folder, evaluate="fake_search:evaluate").complete == 3
        else:
            with pytest.raises(PruneSearchError, match=r"study 'fake'|study fake|study\.db"):
                run_study(more, folder, evaluate="fake_search:evaluate")


def test_a_good_confirmation_is_read_beside_a_bad_one(folder: Path) -> None:
    store = open_store(CONFIG, storage_url(folder))
    uid = store.records()[0].uid
    good = Evaluation(uid, "complete", metrics=(("top1", 1.0),))
    store.confirm(uid, 1, good)
    store._storage.set_study_user_attr(store._study_id, f"confirm:{uid}:0", {**to_mapping(good), "status": "fine"})
    assert store.records()[0].confirmations == (good,)
    store.close()


@pytest.mark.parametrize("text", [*TEXTS.values(), '{"uid": "UID", "status": 5}', '{"owner": "../x"}'])
def test_what_cannot_be_read_of_confirming_is_made_again(folder: Path, text: str) -> None:
    """A damaged confirmation counts as missing, and a damaged claim keeps nobody from it."""
    config = replace(CONFIG, confirm=ConfirmConfig(1, speed_seconds=0))

    def confirmations() -> list[str]:
        run_study(config, folder, evaluate="test_drivers_together:evaluate", search=False)
        found = open_study_readonly(folder).records()
        return sorted(one.uid for record in found for one in record.confirmations)

    every = confirmations()
    uid = every[0].partition(".")[0]
    text, claim = text.replace("UID", every[0]), f"confirming:{every[0]}"
    change(folder, "UPDATE study_user_attributes SET value_json = ? WHERE key = ?", text, f"confirm:{uid}:0")
    change(folder, "UPDATE study_user_attributes SET key = ?, value_json = ? WHERE key = 'vocabulary'", claim, text)
    assert confirmations() == every
