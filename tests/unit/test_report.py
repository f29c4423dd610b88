"""Tables, live view and plots: their contents, and that they can be rendered."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_records import failed, record, study_records
from fake_search import study
from matplotlib.image import imread
from rich.console import Console, RenderableType

from prunesearch.config import Limit, Objective, StopConfig, StudyConfig
from prunesearch.errors import StudyError, UserError
from prunesearch.evaluate.limits import AbsoluteLimit
from prunesearch.front import front, values_of
from prunesearch.record import Record
from prunesearch.report import LiveReport, comparison_table, front_csv, front_table, short, status_view
from prunesearch.report.live import Progress, duration, line, seconds_left, view
from prunesearch.report.plot import _axis_name, plot_front
from prunesearch.report.tables import change, decimals, metrics_table, said
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.events import Done, Event, Finished, Retrying, Started, Stopping, Submitted

RECORDS = study_records()
OBJECTIVES = (Objective("top1", "maximize"), Objective("gmacs", "minimize"))
LATENCY = Objective("latency_ms", "minimize")
CONFIG = study(trials=40, limits=(("gmacs", Limit(at_most=0.0115)),))
LIMITS = (("gmacs", AbsoluteLimit(at_most=0.0115)),)


def printed(what: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(what)
    return console.export_text()


def finish(record: Record, rejected: int = 0) -> Finished:
    assert record.evaluation is not None
    return Finished(record, record.evaluation, rejected)


def after(events: list[Event], config: StudyConfig = CONFIG) -> Progress:
    """The progress after these events, one per second, from second 0."""
    progress = Progress(config, "outputs/fake", begun=0.0)
    for second, event in enumerate(events):
        progress.add(event, float(second))
    return progress


START = Started(records=(), total=40, done=0, rerun=0, recovered=0, workers="2 Ray workers, 1 CPU each")


MOVED = (1, "host"), (2, "mean"), (3, "mean")


def test_short_texts_say_when_tokens_are_back() -> None:
    ends: tuple[int | str | None, ...] = ("next", "end", 6, None)
    stages = [Stage(block, keep=0.5, until=until) for block, until in zip((1, 3, 4, 6), ends, strict=True)]
    text = "1 drop 0.5 until next · 3 drop 0.5 until end · 4 drop 0.5 until 6 · 6 drop 0.5"
    assert short(Schedule(tuple(stages))) == text


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([], "dense"),
        ([Stage(3, keep=0.7), Stage(6, keep=0.7), Stage(9, keep=0.5)], "3, 6 drop 0.7 · 9 drop 0.5"),
        ([Stage(0, tokens=40, reduce="merge")], "0 merge to 40"),
        ([Stage(2, at="pre", keep=0.55, score="key_norm", reduce="fuse")], "2 pre fuse 0.55 (key_norm)"),
        (
            [Stage(2, keep=0.5, score="key_norm"), Stage(3, tokens=20, reduce="merge"), Stage(4, keep=0.5)],
            "2 drop 0.5 by key_norm · 3 merge to 20 · 4 drop 0.5",
        ),
        (
            [Stage(block, keep=0.5, reduce="squeeze", options={"position": where}) for block, where in MOVED],
            "1 squeeze 0.5 · 2, 3 squeeze 0.5 with position mean",
        ),
    ],
)
def test_short(stages: list[Stage], text: str) -> None:
    assert short(Schedule(tuple(stages))) == text


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ({"target_gmacs": 0.00641}, "0.00641 GMACs"),
        ({"target_predicted_latency_ms": 12.345}, "12.3 ms"),
    ],
)
def test_thresholds_and_their_target_are_said(target: dict[str, float], text: str) -> None:
    schedule = Schedule((Stage(2, threshold=0.00213), Stage(4, threshold=0.9, reduce="merge")), **target)
    assert short(schedule) == f"2 drop > 0.0021 · 4 merge > 0.9, towards {text}"


def test_stages_that_share_a_score_name_it_once() -> None:
    stages = Stage(2, keep=0.5, score="key_norm"), Stage(4, keep=0.5, score="key_norm")
    assert short(Schedule(stages)) == "2, 4 drop 0.5 (key_norm)"


def test_numbers_read_well_for_small_and_large_models() -> None:
    assert said("gmacs", 17.5812) == "17.58 GMACs"
    assert said("gmacs", 0.0081234) == "0.008123 GMACs"
    assert said("top1", 97.5) == "top1 97.50 %"
    assert said("of_a_plugin", 1234.56) == "of_a_plugin 1235"
    assert decimals("gmacs", [0.0127, 0.004]) == 5  # the same for a whole column
    assert decimals("gmacs", [0.0, float("nan")]) == 2
    assert change("top1", 96.2, 97.5) == "-1.30"
    assert change("gmacs", 3.0, 4.0) == "75%"
    assert change("throughput", 1500.0, 1000.0) == "1.50x"
    assert change("loss", 1.0, 0.0) == ""


def test_front_table_compares_with_the_dense_model() -> None:
    found = front(RECORDS, OBJECTIVES, LIMITS)
    text = printed(front_table(found, OBJECTIVES, RECORDS))
    rows = [words.split() for words in text.splitlines()]
    numbers = [int(row[0].strip("*")) for row in rows if len(row) > 5 and row[0].strip("*").isdigit() and "." in row[1]]
    assert numbers == [*(record.number for record in found), 0]
    assert ["1", "96.82", "-0.68", "0.00847", "66%", "evit-0.7", "2,", "4,", "6", "drop", "0.7"] in rows
    assert ["0", "97.50", "0.01283", "dense", "for", "comparison"] in rows
    assert sum(row[0].endswith("*") for row in rows if row) == 2  # the knee and its legend


def test_what_was_measured_besides_the_objectives_has_a_table() -> None:
    def also(one: Record, value: float) -> Record:
        last = one.evaluations[-1]
        return replace(one, evaluations=(replace(last, metrics=(*last.metrics, ("agreement", value))),))

    found = front(RECORDS, OBJECTIVES, LIMITS)
    known = [Objective(name, "maximize") for name in values_of(RECORDS[0])]
    assert metrics_table(found, known, RECORDS) is None
    records = [also(RECORDS[0], 100.0), *(also(one, 90.0 + one.number) for one in found)]
    rows = [words.split() for words in printed(metrics_table(records[1:], known, records)).splitlines()]
    for one in found:
        value = 90.0 + one.number
        assert [str(one.number), f"{value:.2f}", f"{value - 100:+.2f}"] in rows
    assert ["0", "100.00"] in rows


def test_front_table_without_a_dense_result() -> None:
    text = printed(front_table([RECORDS[5]], OBJECTIVES, RECORDS[5:]))
    assert "dense" not in text.lower()
    assert "95.94" in text


def test_status() -> None:
    running = replace(RECORDS[4], number=90, state="running", evaluations=())
    text = printed(status_view([*RECORDS, failed(91), failed(92, "nan"), running], CONFIG))
    assert "fake" in text and "36 of 40 candidates done" in text
    assert "failed      3 (oom 2, nan 1)" in text and "last error  trial 92: " in text
    assert "running     1" in text
    assert "best top1   top1 97.53 %, 0.008540 GMACs (trial 2)" in text
    assert "8 candidates, hypervolume 0.6" in text
    nothing = printed(status_view([], replace(CONFIG, stop=StopConfig(trials=None, hours=1))))
    assert "0 candidates done" in nothing and "hypervolume" not in nothing


def test_csv_has_a_row_for_each() -> None:
    found = front(RECORDS, OBJECTIVES)
    rows = list(csv.DictReader(io.StringIO(front_csv(found, OBJECTIVES))))
    assert [int(row["trial"]) for row in rows] == [record.number for record in found]
    assert list(rows[0])[:6] == ["trial", "uid", "origin", "top1", "gmacs", "latency_ms"]
    assert float(rows[0]["top1"]) == found[0].evaluations[0].value("top1")  # not rounded
    assert len(rows[0]["tokens"].split()) == 8


def test_comparison_shows_both_and_the_change() -> None:
    dense, pruned = RECORDS[0].evaluations[0], RECORDS[1].evaluations[0]
    rows = [words.split() for words in printed(comparison_table(dense, pruned)).splitlines()]
    assert ["top1", "(%)", "97.50", "96.82", "-0.68"] in rows
    assert ["gmacs", "(GMACs)", "0.01283", "0.00847", "66%"] in rows
    assert ["tokens", "in", "the", "last", "block", "65", "24", "37%"] in rows
    assert any("±" in row for row in rows)


# --- live --------------------------------------------------------------------------------------------------------


def test_view_shows_counts_running_candidates_and_the_front() -> None:
    events: list[Event] = [START]
    for one in RECORDS:
        events += [Submitted(replace(one, state="running", evaluations=()), 0), finish(one, rejected=7)]
    waiting = replace(record(50, Schedule((Stage(3, keep=0.5),))), state="running", evaluations=())
    progress = after([*events, Submitted(waiting, attempt=1)])
    text = printed(view(progress, now=80.0))
    assert "outputs/fake · 2 Ray workers, 1 CPU each · 1 min 20 s" in text
    assert "34/40 done · 1 failed (oom 1) · 7 rejected · about 14 s left" in text
    assert "trial 50" in text and "11 s" in text and "(attempt 2)" in text and "3 drop 0.5" in text
    assert "front: 8, hypervolume 0.6" in text and "in the last 20 results)" in text
    assert progress.gain is not None and progress.gain >= 0
    assert "trial 33 failed (oom): out of memory" in text
    assert all(len(row) <= 100 for row in text.splitlines())


def test_view_shows_at_most_eight_of_a_long_front() -> None:
    many = [record(0, Schedule(), "dense")]
    for number in range(1, 15):
        value = (("top1", 90 + number / 2), ("gmacs", 0.004 + number * 0.0001))
        many.append(
            replace(RECORDS[5], number=number, evaluations=(replace(RECORDS[5].evaluations[0], metrics=value),))
        )
    progress = after([START, *map(finish, many)], replace(CONFIG, limits=()))
    text = printed(view(progress, now=20.0))
    assert "front: 15 (8 shown)" in text
    numbers = [row.split()[0].strip("*") for row in text.splitlines() if "%" in row and row.split()[0][0].isdigit()]
    assert len(numbers) == 8 and {"0", "1"} <= set(numbers)  # both ends


def test_view_before_the_first_result_and_without_a_known_end() -> None:
    config = replace(CONFIG, stop=StopConfig(trials=None, hours=2.0))
    progress = after([replace(START, total=None), Submitted(RECORDS[0], 0)], config)
    text = printed(view(progress, now=3600.0))
    assert "0 done · 0 failed · 0 rejected · about 1 h 00 min left" in text
    assert "front" not in text
    assert seconds_left(after([START]), now=5.0) is None


def test_lines_for_a_log() -> None:
    events: list[Event] = [
        START,
        Submitted(RECORDS[0], 0),
        finish(RECORDS[0]),
        finish(failed(1)),
        finish(RECORDS[2]),
        Retrying(RECORDS[3], 1, "worker died"),
        Stopping("interrupted", 2, "SIGINT came"),
        Done("interrupted", complete=2, failed=1, running=1, rejected=4, seconds=125.0),
    ]
    progress = Progress(CONFIG, "outputs/fake", begun=0.0)
    lines = []
    for event in events:
        progress.add(event, 1.0)
        lines.append(line(progress, event))
    assert lines == [
        "fake: starting, vit_digits_patch1_8 on digits -> outputs/fake, 2 Ray workers, 1 CPU each",
        "",
        "1/40  trial 0  complete  top1 97.50 %  0.01283 GMACs  3.5 s    dense",  # over the limit, so no asterisk
        "2/40  trial 1  failed (oom): out of memory  0.0 s",
        "3/40  trial 2  complete  top1 97.53 %  0.00854 GMACs  3.5 s  * 2, 4, 6 squeeze 0.7",
        "trial 3 again: worker died",
        "stopping: SIGINT came; 2 running are waited for",
        "2 complete, 1 failed, 1 running, 4 rejected in 2 min 05 s: interrupted; run it again to continue",
    ]
    started = Started((RECORDS[0], RECORDS[1]), total=40, done=2, rerun=1, recovered=1, workers="serial")
    assert line(after([started]), started) == (
        "fake: continuing (2 of 40 done, 1 to run again, 1 recovered), "
        "vit_digits_patch1_8 on digits -> outputs/fake, serial"
    )
    assert duration(7384) == "2 h 03 min"


def test_report_prints_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with LiveReport(CONFIG, "outputs/fake", console=Console(file=out, width=40)) as report:
        for event in (START, Submitted(RECORDS[0], 0), finish(RECORDS[0])):
            report(event)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[1].startswith("1/40  trial 0  complete")  # not folded at the width


@pytest.mark.parametrize("plain", [False, True])
def test_report_on_a_terminal_leaves_the_last_view(plain: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with LiveReport(CONFIG, "outputs/[fake]", console=console, plain=plain) as report:
        report(START)
        report(finish(RECORDS[0]))
        report(finish(RECORDS[2]))
        report(Done("trials", complete=2, failed=0, running=0, rejected=0, seconds=5.0))
    text = out.getvalue()
    assert "outputs/[fake]" in text
    assert "all candidates of stop.trials are done" in text
    assert ("front: 1" in text) is not plain


# --- plots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objectives",
    [OBJECTIVES, (*OBJECTIVES, LATENCY), OBJECTIVES[:1], (OBJECTIVES[1], LATENCY)],
    ids=["two", "three", "one", "costs"],
)
def test_plot_is_a_picture(objectives: tuple[Objective, ...], tmp_path: Path) -> None:
    plot_front(RECORDS, objectives, tmp_path / "front.png", limits=LIMITS, title="digits")
    picture = imread(tmp_path / "front.png")
    assert picture.shape[:2] == (1000, 1600)
    assert 0.8 < (picture[..., :3].min(axis=2) > 0.99).mean() < 0.99  # mostly white, and not blank
    blue = np.abs(picture[..., :3] - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=2) < 0.02
    assert blue.sum() > 50  # the front


@pytest.mark.parametrize("name", ["a $x^2$ b", "$$", "a$", "$\\frac{$", "50 % & _under_ ^"])
def test_a_name_in_a_plot_is_no_formula(name: str, tmp_path: Path) -> None:
    start = replace(RECORDS[1], origin=f"start: {name}")
    plot_front([RECORDS[0], start, *RECORDS[2:]], OBJECTIVES, tmp_path / "front.svg", title=name)
    assert (tmp_path / "front.svg").stat().st_size > 10_000


def test_plot_of_a_study_with_little_in_it(tmp_path: Path) -> None:
    plot_front(RECORDS[:1], OBJECTIVES, tmp_path / "dense.png")
    plot_front(RECORDS[:1], OBJECTIVES, tmp_path / "none.png", limits=(("gmacs", AbsoluteLimit(at_most=0.001)),))
    assert (tmp_path / "dense.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="its suffix says no format"):
        plot_front(RECORDS, OBJECTIVES, tmp_path / "front")
    with pytest.raises(StudyError, match="no candidate is complete"):
        plot_front([failed(1)], OBJECTIVES, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_the_axis_of_predicted_milliseconds_has_its_unit_once() -> None:
    assert _axis_name("predicted_latency_ms") == "predicted time of a batch (ms)"
