"""Tables about measured speed: how many times as fast as the dense model schedules are, timed in turns with it."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from prunesearch.evaluate.task import Speed
from prunesearch.printable import printable

WIDE = 1.5
"""Ratio of the quartiles of a speed beyond which the machine was too busy to measure it."""


def measured(speed: Speed | None) -> str:
    """A measured speed as text, such as "1.52 (1.50 to 1.55)"; "" when there is none."""
    if speed is None or speed.ratio is None or speed.low is None or speed.high is None:
        return ""
    return f"{speed.ratio:.2f} ({speed.low:.2f} to {speed.high:.2f})" if speed.name else f"{speed.ratio:.2f}"


def predicted(speed: Speed | None) -> str:
    """A predicted speed as text; "" when there is none."""
    return "" if speed is None or speed.predicted is None else f"{speed.predicted:.2f}"


def speed_table(rows: Sequence[tuple[str, str, str, Speed]]) -> Table:
    """A table of speeds. rows: trial, origin and schedule as text, and the speed."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False)
    speeds = [speed for *_, speed in rows]
    has_trials, predicts = any(trial for trial, *_ in rows), any(map(predicted, speeds))
    if has_trials:
        table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("origin", overflow="fold", max_width=20)
    if predicts:
        table.add_column("predicted\nx dense", justify="right", no_wrap=True)
    table.add_column("measured\nx dense", justify="right", no_wrap=True)
    table.add_column("ms of\na batch", justify="right", no_wrap=True)
    table.add_column("schedule", overflow="fold")
    for trial, origin, schedule, speed in rows:
        cells = [Text(trial)] * has_trials + [Text(printable(origin))] + [Text(predicted(speed))] * predicts
        ms = "" if speed.ms is None else f"{speed.ms:.4g}"
        table.add_row(*cells, measured(speed) or "not timed", ms, Text(printable(schedule)))
    table.caption = Text("\n".join(_notes(speeds)))
    return table


def _notes(speeds: Sequence[Speed]) -> list[str]:
    """What the columns mean, where they were measured, and what was not timed."""
    conditions = next((speed.conditions for speed in speeds if speed.conditions is not None), None)
    if conditions is None:
        return []
    notes = [
        "x dense: how many times as fast as the dense model, timed in turns with it; median of the rounds' ratios "
        f"(quartiles); {printable(str(conditions))}"
    ]
    if conditions.profiled and any(map(predicted, speeds)):
        notes.append(f"predicted: for another device than this one, {printable(conditions.profiled)}")
    if any(speed.low is not None and speed.high is not None and speed.high > WIDE * speed.low for speed in speeds):
        notes.append("the quartiles are far apart: something else kept the machine busy. Measure again when it is idle")
    problems = dict.fromkeys(speed.problem for speed in speeds if speed.problem)
    return notes + [f"not timed: {printable(problem)}" for problem in problems]
