"""Reports of several rungs: candidates per rung, and whether small budgets predict larger ones."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from fake_records import record as made_up
from fake_search import RUNGS, study
from rich.console import Console, RenderableType

from prunesearch.evaluate.task import Evaluation
from prunesearch.record import Record, with_evaluation
from prunesearch.report import LiveReport, front_table, status_view
from prunesearch.report.live import Progress, line, seconds_left, view
from prunesearch.report.rung_tables import compared, rungs_table, warnings, work_left
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.events import Done, Event, Finished, Started, Submitted

CONFIG = study(trials=20, rungs=RUNGS)
SECONDS = (1.0, 4.0, 16.0)


def climbed(number: int, rung: int, *, sign: int = 1) -> Record:
    """A candidate with results up to a rung. Later ones cost more. sign -1: training reverses the order."""
    kept = 0.4 + 0.5 * number / 20
    schedule = Schedule((Stage(1, keep=kept),)) if number else Schedule()
    one = replace(made_up(number, schedule, "dense" if number == 0 else "sampler"), evaluations=(), state="running")
    gmacs = 0.004 + 0.0002 * number
    for at in range(rung + 1):
        top1 = 80.0 + (sign if at else 1) * number / 2 + at
        metrics = (("top1", top1), ("gmacs", gmacs))
        evaluation = Evaluation(one.uid, "complete", at, metrics=metrics, seconds=(("train", SECONDS[at]),))
        one = with_evaluation(replace(one, rung=at), evaluation, order=3 * number + at, last_rung=2)
    return one


def broken(one: Record) -> Record:
    evaluation = Evaluation(one.uid, "failed", one.rung + 1, cause="oom", error="no memory")
    return with_evaluation(replace(one, rung=one.rung + 1), evaluation, order=99, last_rung=2)


RECORDS = [
    climbed(0, 2),
    *(climbed(number, 1) for number in range(1, 10)),
    *(climbed(number, 0) for number in range(10, 15)),
    broken(climbed(15, 1)),
    replace(climbed(16, 1), state="running", rung=2),
    Record(17, "new", Schedule(), "running", "sampler", 0),
]


def printed(what: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(what)
    return console.export_text()


def rows(text: str) -> list[list[str]]:
    return [words.split() for words in text.splitlines()]


def test_the_table_counts_everybody_once_at_each_rung() -> None:
    text = rows(printed(rungs_table(RECORDS, CONFIG)))
    #       rung images done went waiting running failed
    assert ["0", "0", "17", "12", "5", "1", "0", "top1", "1.00", "(1.00", "1.00", "-)"] in text
    assert ["1", "640", "12", "3", "9", "0", "0"] in text  # one pair is too few for a correlation
    assert ["2", "2,560", "1", "1", "1", "the", "front"] in text
    assert all(len(line) <= 80 for line in printed(rungs_table(RECORDS, CONFIG)).splitlines())


def test_rungs_that_disagree_are_pointed_out() -> None:
    turned = [climbed(number, 1, sign=-1) for number in range(1, 13)]
    (warning,) = warnings(turned, CONFIG)
    assert "Kendall's tau of top1 is -1.00 over 12 candidates, under 0.5. Raise rungs[0].images" in warning
    assert "top1 -1.00 (-1.00 -1.00 -1.00)" in printed(rungs_table(turned, CONFIG), width=90)
    assert "waiting" in printed(rungs_table(turned, CONFIG), width=70)  # the last column folds, not the others
    assert warnings(turned[:5], CONFIG) == warnings(RECORDS, CONFIG) == []


def test_the_front_says_whom_it_compares() -> None:
    assert compared(RECORDS, CONFIG) == "of 1 at rung 2"
    assert compared(RECORDS[1:], CONFIG) == "of 10 at rung 1; rung 2 has no result yet"
    assert compared([], CONFIG) == "of 0 at rung 0; rung 2 has no result yet"
    assert compared(RECORDS, study()) == ""
    assert "compared at rung 1, where 10 of 17 candidates are" in printed(
        front_table(RECORDS[1:3], CONFIG.objectives, RECORDS[1:])
    )
    assert "compared" not in printed(front_table(RECORDS[10:12], CONFIG.objectives, RECORDS[10:15]))


def test_status_of_several_rungs() -> None:
    text = printed(status_view(RECORDS, CONFIG))
    assert "17 of 20 candidates, 31 evaluations" in text
    assert "failed      1 (oom 1)" in text and "running     2" in text
    assert "1 candidates of 1 at rung 2, hypervolume" in text
    assert "rank correlation" in text and "Raise" not in text
    turned = [climbed(number, 1, sign=-1) for number in range(13)]
    assert "Raise rungs[0].images" in printed(status_view(turned, CONFIG))


def test_work_that_is_left_counts_each_rung() -> None:
    everybody_at_rung_0 = [climbed(number, 0) for number in range(6)]
    assert work_left(everybody_at_rung_0, CONFIG, 20) is None  # the duration of rung 1 is unknown
    # 60 candidates, 20 and 6 promoted; 17, 12 and 2 evaluated, one of which failed at once
    assert work_left(RECORDS, CONFIG, 60) == pytest.approx(43 * 1.0 + 8 * 4.0 + 4 * 16.0 / 2)
    assert work_left(RECORDS, CONFIG, 3) == 0
    progress = Progress(CONFIG, "outputs/fake", begun=0.0, total=60, records={one.number: one for one in RECORDS[:17]})
    progress.seconds = 22.0  # seconds of evaluation in 11 s: two workers
    assert seconds_left(progress, now=11.0) == pytest.approx((43 + 8 * 4 + 4 * 8) / 2)


def events(records: list[Record]) -> list[Event]:
    found: list[Event] = [Started((), total=20, done=0, rerun=0, recovered=0, workers="2 workers")]
    for one in records:
        for evaluation in one.evaluations:
            until = replace(
                one, evaluations=one.evaluations[: evaluation.rung + 1], orders=one.orders, rung=evaluation.rung
            )
            found += [Submitted(until, 0), Finished(until, evaluation, 0)]
    return found


def test_the_view_shows_rungs_and_where_running_ones_are() -> None:
    progress = Progress(CONFIG, "outputs/fake", begun=0.0)
    for second, event in enumerate(events(RECORDS[:5])):
        progress.add(event, float(second))
    progress.add(Submitted(replace(RECORDS[1], rung=2), 1), 20.0)
    text = printed(view(progress, now=25.0), width=100)
    assert "5/20 candidates, 11 evaluations" in text
    assert "trial 1  5 s  sampler, rung 2 (attempt 2)" in text
    assert ["1", "640", "5", "2", "3", "0", "0"] in rows(text)
    assert "front: 1 of 1 at rung 2" in text


def test_lines_name_the_rung_and_the_end_shows_the_table() -> None:
    out = io.StringIO()
    with LiveReport(CONFIG, "outputs/fake", console=Console(file=out, width=90)) as report:
        for event in events(RECORDS[:1]):
            report(event)
        report(Done("trials", complete=1, failed=0, running=0, rejected=0, seconds=5.0, paused=3))
    text = out.getvalue()
    assert "1/20  trial 0  rung 1  top1 81.00 %" in text
    assert "1 complete, 3 at lower rungs, 0 failed" in text
    assert ["1", "640", "1", "1", "0", "0", "0"] in rows(text)


def test_results_of_a_rung_come_in_the_order_of_the_latest() -> None:
    progress = Progress(CONFIG, "outputs/fake", begun=0.0)
    started = Started(tuple(RECORDS[:3]), total=20, done=3, rerun=0, recovered=0, workers="serial")
    progress.add(started, 0.0)
    assert list(progress.records) == [0, 1, 2]
    later = climbed(0, 2)
    assert later.evaluation is not None
    progress.add(Finished(later, later.evaluation, 0), 1.0)
    assert list(progress.records) == [1, 2, 0]
    assert line(progress, started).startswith("fake: continuing (3 of 20 done")


def test_a_long_schedule_takes_no_room_from_the_numbers() -> None:
    stages = tuple(Stage(block, keep=0.5 + block / 20, reduce="fuse") for block in range(7))
    long = [made_up(number, Schedule(stages[:length])) for number, length in enumerate((7, 1))]
    text = printed(front_table(long, CONFIG.objectives, long, title="front", most=8), width=80)
    for one in long:
        assert f"{dict(one.evaluations[0].metrics)['top1']:.2f}" in text
    assert "…" in text and all(len(line) <= 80 for line in text.splitlines())
