"""Text from files, databases, names and other libraries never controls the terminal."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import fake_search
import pytest
from rich.table import Table
from rich.text import Text

from prunesearch.cli import main
from prunesearch.config import Objective, SpaceConfig, StudyConfig
from prunesearch.evaluate import METRICS
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import save_schedule
from prunesearch.printable import printable
from prunesearch.report import LiveReport
from prunesearch.report.terminal import PlainConsole
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.driver import run_study
from prunesearch.search.events import Finished, Started, Submitted, Waiting
from prunesearch.study.reader import open_study_readonly
from prunesearch.tokens import REDUCERS, SCORERS

EVIL = "a\x1b]0;title\x07\x9b2J\x1b[2J\u202e\r\nprunesearch: all is fine [red]b[/red][link=http://x]c[/link]"
COLOURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]|\x1b\[2K|\r")
"""What rich itself writes: colours, and the moves of the live view."""
DANGEROUS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]")


def harmless(text: str) -> bool:
    """Whether a text has no control characters, and no data starts a line that looks like our message."""
    return not DANGEROUS.search(text) and "\nprunesearch: all is fine" not in text and "[red]" in text


@pytest.mark.parametrize("number", [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x202E, 0x2066, 0xDC80])
def test_control_characters_become_visible(number: int) -> None:
    text = printable(f"a{chr(number)}b")
    assert text.isprintable() and text.startswith("a\\") and text.endswith("b")
    assert printable(text) == text
    assert (printable(chr(number), lines=True) == chr(number)) == (chr(number) in "\t\n")


def test_what_people_write_stays() -> None:
    assert printable("Größe 3 → 5 · ViT-S/16 日本 [x]") == "Größe 3 → 5 · ViT-S/16 日本 [x]"


def evaluate(task: Task) -> Evaluation:
    """Every second evaluation fails, with a message from another library."""
    found = fake_search.evaluate(task)
    metrics = (*found.metrics, (EVIL, 100 - found.value("top1")))
    if task.schedule.stages and int(task.uid, 16) % 2:
        return replace(found, status="failed", cause="error", error=EVIL + "\x00", traceback=EVIL + "\x00", metrics=())
    return replace(found, metrics=metrics)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A study in which every name has control characters. Its plug-in is not imported."""
    folder = tmp_path_factory.mktemp("evil")
    start = folder / "start.yaml"
    save_schedule(Schedule((Stage(3, keep=0.5),)), start)
    evil = folder / f"{EVIL.replace('/', '|')}.yaml"
    start.rename(evil)
    SCORERS.add(EVIL, replace(SCORERS["key_norm"], name=EVIL))
    REDUCERS.add(EVIL, replace(REDUCERS["drop"], name=EVIL))
    METRICS.add(EVIL, replace(METRICS["loss"], name=EVIL, unit="[red]%[/red]\x1b[2J"))
    space = SpaceConfig(blocks=(1, 2), keep=(0.5, 0.7), score=(EVIL,), reduce=(EVIL,), start_from=(str(evil),))
    config: StudyConfig = fake_search.study(
        trials=8, space=space, objectives=(Objective("gmacs", "minimize"), Objective(EVIL, "minimize"))
    )
    run_study(config, folder, evaluate=f"{__name__}:evaluate")
    with closing(sqlite3.connect(folder / "study.db")) as database, database:  # any name is possible elsewhere
        database.execute("UPDATE studies SET study_name = ?", (EVIL,))
        (text,) = database.execute("SELECT value_json FROM study_user_attributes WHERE key = 'config'").fetchone()
        renamed = json.dumps({**json.loads(text), "name": EVIL})
        database.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = 'config'", (renamed,))
    yield folder
    for registry in (SCORERS, REDUCERS, METRICS):
        registry._things.pop(EVIL, None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("on_terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("has_plugin", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "STUDY"],
        ["front", "STUDY"],
        ["front", "STUDY", "--csv"],
        ["export", "STUDY", "-o", "TMP/a.yaml"],
        ["export", "STUDY", "-o", f"TMP/{EVIL.replace('/', '|')}"],
        ["export", "STUDY", "--at-most", f"{EVIL}=-1"],
        ["export", "STUDY", "--at-most", f"no{EVIL}=1"],
        ["check", f"STUDY/{EVIL}"],
        ["check", "STUDY/study.yaml", "--set", f"{EVIL}=1"],
        ["status", "--storage", "sqlite:///STUDY/study.db", "--study", f"no{EVIL}"],
        ["list", "reduces"],
    ],
    ids=lambda arguments: " ".join(arguments)[:24].encode("unicode_escape").decode(),
)
def test_no_verb_passes_it_on(
    arguments: list[str],
    has_plugin: bool,
    on_terminal: bool,
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not has_plugin:
        for registry in (SCORERS, REDUCERS, METRICS):
            monkeypatch.delitem(registry._things, EVIL)  # type: ignore[attr-defined]
    if on_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    main([argument.replace("STUDY", str(study)).replace("TMP", str(tmp_path)) for argument in arguments])
    said = capsys.readouterr()
    text = said.out + said.err
    assert text
    assert not DANGEROUS.search(COLOURS.sub("", text)) and "\nprunesearch: all is fine" not in text
    if has_plugin or arguments[0] != "list":
        assert "[red]" in text.replace("\n", "")


@pytest.mark.parametrize("on_terminal", [False, True], ids=["pipe", "terminal"])
def test_neither_does_the_live_view(
    on_terminal: bool, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if on_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    reader = open_study_readonly(study)
    records, config = reader.records(), reader.config
    reader.close()
    with LiveReport(config, EVIL, console=PlainConsole()) as report:
        report(Started(records, 8, 8, 0, 0, EVIL))
        report(Submitted(replace(records[1], origin=EVIL), 0))
        for record in records:
            if record.evaluation is not None:
                report(Finished(record, record.evaluation, 0))
        report(Waiting(EVIL, 3.0))
    said = capsys.readouterr()
    assert harmless(COLOURS.sub("", said.out + said.err))


def test_cells_and_titles_are_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table(EVIL, title=EVIL, caption=EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL))
    console = PlainConsole()
    console.print(table, EVIL, ":smile:")
    text = COLOURS.sub("", capsys.readouterr().out)
    assert not DANGEROUS.search(text) and text.count("[red]b[/red]") == 6 and ":smile:" in text


def test_warnings_of_the_library_are_printed_harmlessly(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "samplers"])
    assert logging.lastResort is not None
    record = logging.LogRecord("prunesearch.x", logging.WARNING, "x", 1, "%s", (EVIL,), None)
    logging.lastResort.handle(record)
    assert not DANGEROUS.search(capsys.readouterr().err)


def test_json_is_ascii(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", str(study), "--json"]) == 0
    text = capsys.readouterr().out
    assert text.isascii() and not DANGEROUS.search(text)
    assert EVIL in json.loads(text)[0]["metrics"]
