"""Tables and texts about candidates: front, status, comparison, CSV. Functions from records to rich renderables."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prunesearch.config import DEFAULT_SCORE, Objective, StudyConfig
from prunesearch.confirmation import confirmation_of, mean_drop, measured_objectives
from prunesearch.evaluate import METRICS
from prunesearch.evaluate.task import Evaluation
from prunesearch.front import (
    Evaluated,
    dense_of,
    front,
    front_rows,
    highest_rung,
    knee,
    normalised_hypervolume,
    sibling_rows,
    values_of,
)
from prunesearch.printable import printable
from prunesearch.record import Record, Sibling
from prunesearch.relative_limits import limit_lines, limits_of
from prunesearch.report.rung_tables import compared, rungs_table, warnings
from prunesearch.report.speed_tables import measured, speed_table
from prunesearch.schedule import Schedule, Stage, unusual_options


def short(schedule: Schedule) -> str:
    """A schedule on one line, such as "3, 6 squeeze 0.7 · 9 drop > 0.0021", where > is a threshold.

    A score other than the default is shown once at the end if all stages share it, else with its stage. Options that
    differ from their default, and when the tokens are back, are shown with theirs.
    """
    if not schedule.stages:
        return "dense"
    scores = {stage.score for stage in schedule.stages} - {"none"}
    shared = scores.pop() if len(scores) == 1 else DEFAULT_SCORE
    alike = groupby(schedule.stages, key=lambda stage: _what(stage, unsaid=("none", DEFAULT_SCORE, shared)))
    stages = " · ".join(f"{', '.join(str(stage.block) for stage in group)} {what}" for what, group in alike)
    score = "" if shared == DEFAULT_SCORE else f" ({shared})"
    target = "" if schedule.target is None else f", towards {schedule.target.amount:.3g} {schedule.target.unit}"
    return printable(stages + score + target)


def unit_of(metric: str) -> str:
    """The unit of a metric; "" for a metric of a plug-in that is not imported."""
    return METRICS[metric].unit if metric in METRICS else ""


def decimals(metric: str, values: Iterable[float]) -> int:
    """Number of decimals to show: 2 for percentages, else 4 significant digits of the largest value."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if unit_of(metric) == "%" or largest == 0:
        return 2
    return max(0, 3 - math.floor(math.log10(largest)))


def said(metric: str, value: float, places: int | None = None) -> str:
    """A value as text, such as "top1 97.50 %", or "0.01270 GMACs" when the unit equals the metric's name."""
    places, unit = decimals(metric, [value]) if places is None else places, unit_of(metric)
    name = "" if unit.lower() == metric else f"{printable(metric)} "
    return f"{name}{value:.{places}f} {unit}".rstrip()


def change(metric: str, value: float, before: float) -> str:
    """Change from `before`: a difference in points for percentages, else a ratio; "" if `before` is 0."""
    if unit_of(metric) == "%":
        return f"{value - before:+.2f}"
    if before == 0:
        return ""
    ratio = value / before
    return f"{ratio:.2f}x" if ratio > 1.005 else f"{ratio:.0%}"


def evenly(found: Sequence[Record], most: int) -> list[Record]:
    """At most `most` (2 or more) records, evenly spaced along a front, both ends included."""
    if len(found) <= most:
        return list(found)
    return [found[round(index * (len(found) - 1) / (most - 1))] for index in range(most)]


def front_table(
    found: Sequence[Record],
    objectives: Sequence[Objective],
    records: Sequence[Record],
    *,
    title: str | None = None,
    most: int | None = None,
) -> Table:
    """A table of a front, one record per row, compared with the dense model. The knee has an asterisk.

    records: all candidates, for the dense model and the notes. title: without one, notes are added. most: show at most
    this many rows, one line each.
    """
    dense, names = dense_of(records), [objective.metric for objective in objectives]
    confirmed = any(record.confirmations for record in found)
    again = {one.metric for one in measured_objectives(objectives)} if confirmed else set()
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    for name in names:
        _add_metric(table, name, dense)
        if name in again:
            table.add_column("again", justify="right", no_wrap=True)
    table.add_column("origin", overflow="fold", max_width=20)
    one_line = most is not None  # with a limit on rows each row has one line
    table.add_column("schedule", overflow="fold")
    compared = [values_of(record) for record in [*found, *([dense] if dense else [])]]
    places = {name: decimals(name, [values[name] for values in compared]) for name in names}
    bend = knee(found, objectives) if found else None
    shown = list(found) if most is None else evenly(found, most)
    for record in shown:
        row = [f"{record.number}*" if record is bend else f"{record.number} "]
        for name in names:
            value = values_of(record)[name]
            row.append(f"{value:.{places[name]}f}")
            if dense is not None:
                row.append(change(name, value, values_of(dense)[name]))
            if name in again:
                row.append(_again(record, name, places[name]))
        # no_wrap on the cell, not the column: rich would shrink all other columns before a no_wrap one
        schedule = Text(short(record.outcome), no_wrap=one_line, overflow="ellipsis" if one_line else "fold")
        table.add_row(*row, Text(printable(record.origin.removeprefix("start: "))), schedule)
    if dense is not None and dense not in shown:
        values = values_of(dense)
        cells = []
        for name in names:
            cells += [f"{values[name]:.{places[name]}f}", ""]
            cells += [_again(dense, name, places[name])] if name in again else []
        table.add_row(f"{dense.number} ", *cells, "dense", "for comparison", style="dim")
    notes = ["* the knee: what export takes when nothing else is asked"] if bend in shown else []
    if title is None:
        notes += data_lines(records)
        notes += _again_notes(found, objectives, dense)
    if title is None and any(record.rung_done != highest_rung(records) for record in records if record.evaluations):
        there = [record for record in records if values_of(record) and record.rung_done == highest_rung(records)]
        notes.append(f"compared at rung {highest_rung(records)}, where {len(there)} of {len(records)} candidates are")
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def metrics_table(found: Sequence[Record], objectives: Sequence[Objective], records: Sequence[Record]) -> Table | None:
    """A table of what was measured besides the objectives, for the front and the dense model; None when nothing was."""
    dense = dense_of(records)
    rows = [*found, *([dense] if dense is not None and dense not in found else [])]
    values, before = [values_of(record) for record in rows], values_of(dense) if dense is not None else {}
    known = dict.fromkeys(name for one in values for name in one)
    names = [name for name in known if name not in {objective.metric for objective in objectives}]
    if not names:
        return None
    table = Table(box=box.SIMPLE_HEAD, title="also measured", title_justify="left", pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    for name in names:
        _add_metric(table, name, dense)
    places = {name: decimals(name, [one[name] for one in values if name in one]) for name in names}
    for record, own in zip(rows, values, strict=True):
        cells = []
        for name in names:
            cells.append(f"{own[name]:.{places[name]}f}" if name in own else "")
            if dense is not None:
                compares = record is not dense and name in own and name in before
                cells.append(change(name, own[name], before[name]) if compares else "")
        table.add_row(str(record.number), *cells, style="dim" if record is dense and record not in found else None)
    return table


def siblings_table(
    siblings: Sequence[Sibling], found: Sequence[Record], objectives: Sequence[Objective], records: Sequence[Record]
) -> Table:
    """A table of the measured dense siblings, and which trials of the front `found` beat them or are beaten.

    records: all candidates, for the dense model.
    """
    rows, dense = sibling_rows(siblings, found, objectives), dense_of(records)
    text = "dense siblings"
    table = Table(box=box.SIMPLE_HEAD, title=text, title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column("model", overflow="fold")
    names = [objective.metric for objective in objectives]
    for name in names:
        _add_metric(table, name, dense)
    for heading in ("beaten by\ntrials", "beats\ntrials"):
        table.add_column(heading, overflow="fold")
    compared = [row["metrics"] for row in rows] + ([values_of(dense)] if dense else [])
    for row in rows:
        cells = []
        for name in names:
            value = row["metrics"][name]
            cells.append(f"{value:.{decimals(name, [values[name] for values in compared])}f}")
            cells += [change(name, value, values_of(dense)[name])] if dense is not None else []
        trials = [", ".join(map(str, row[which])) or "none" for which in ("beaten_by", "beats")]
        table.add_row(Text(printable(row["origin"].removeprefix("dense sibling: "))), *cells, *trials)
    table.caption = Text(
        "dense models with weights of their own, as they come: not fine-tuned here, no part of the search\n"
        "beaten by: trials of the front that are no worse in every objective, and better in one"
    )
    return table


def _add_metric(table: Table, name: str, dense: Record | None) -> None:
    """Add the column of a metric, and one that compares with the dense model if there is one."""
    unit = unit_of(name)
    table.add_column(printable(name) + (f"\n{unit}" if unit else ""), justify="right", no_wrap=True)
    if dense is not None:
        table.add_column("to\ndense" if unit == "%" else "of\ndense", justify="right", no_wrap=True, style="dim")


def siblings_line(siblings: Sequence[Sibling], objectives: Sequence[Objective]) -> str:
    """How many of the dense siblings are measured, and their objectives."""
    measured = [sibling for sibling in siblings if values_of(sibling)]
    shown = [f"{printable(sibling.name)} {_values(sibling, objectives)}" for sibling in measured]
    return "; ".join([f"{len(measured)} of {len(siblings)} measured", *shown])


def _again(record: Record, metric: str, places: int) -> str:
    again = confirmation_of(record)
    if again is None:
        return ""
    spread = again.spread.get(metric)
    return f"{again.mean[metric]:.{places}f}" + (f" ± {spread:.{places}f}" if spread is not None else "")


def speeds_table(records: Sequence[Record]) -> Table | None:
    """A table of all schedules of a study that were timed, the dense model first; None when none was."""
    timed = [record for record in records if record.speed is not None]
    timed.sort(key=lambda record: (record.origin != "dense", record.number))
    rows = [
        (f"{record.number}", record.origin.removeprefix("start: "), short(record.outcome), record.speed)
        for record in timed
        if record.speed is not None
    ]
    return speed_table(rows) if rows else None


def _again_notes(found: Sequence[Record], objectives: Sequence[Objective], dense: Record | None) -> list[str]:
    """A note that explains the "again" columns, and the mean difference to the search's own values."""
    summaries = [again for record in found if (again := confirmation_of(record)) is not None]
    measured = measured_objectives(objectives)
    if not summaries or not measured:
        return []
    metric, seeds = measured[0].metric, summaries[0].seeds
    images = "test images" if summaries[0].split == "test" else "the same images"

    def worse(records: Sequence[Record]) -> str:
        drop = mean_drop(records, measured[0])
        assert drop is not None
        amount = f"{abs(drop):.2f} points" if unit_of(metric) == "%" else said(metric, abs(drop)).removeprefix(metric)
        return f"{amount.strip()} {'worse' if drop >= 0 else 'better'}"

    chosen = [record for record in found if record is not dense and record.confirmations]
    text = f"again: trained and measured anew, {seeds} seed{'s' if seeds > 1 else ''}, {images}"
    if chosen:
        text += f"; {metric} is on average {worse(chosen)} than in the search, which chose by its own numbers"
    if dense is not None and dense.confirmations:
        text += f" (the dense model: {worse([dense])})"
    return [text]


def status_view(records: Sequence[Record], config: StudyConfig, siblings: Sequence[Sibling] = ()) -> RenderableType:
    """Status of a study: counts, causes of failures, best candidates, front, dense siblings and rungs."""
    states = Counter(record.state for record in records)
    done, total = sum(bool(record.evaluations) for record in records), config.stop.trials
    several = len(config.rungs) > 1
    evaluations = f", {sum(len(record.evaluations) for record in records)} evaluations" if several else " done"
    counts = f"{done}{f' of {total}' if total is not None else ''} candidates{evaluations}"
    lines = [(printable(config.name), counts)]
    if states["running"]:
        lines.append(("running", f"{states['running']}"))
    if states["failed"]:
        lines.append(("failed", f"{states['failed']} ({causes(records)})"))
        last = max((record for record in records if record.state == "failed"), key=lambda record: record.number)
        if last.evaluation is not None and last.evaluation.error:
            lines.append(("last error", f"trial {last.number}: {first_line(last.evaluation)}"))
    limits = limits_of(config, records)
    found = front(records, config.objectives, limits)
    dense = dense_of(records)
    if dense is not None:
        lines.append(("dense", _values(dense, config.objectives)))
    if found:
        first = config.objectives[0]
        pick = max if first.goal == "maximize" else min
        best = pick(found, key=lambda record: values_of(record)[first.metric])
        lines.append((f"best {first.metric}", f"{_values(best, config.objectives)} (trial {best.number})"))
        bend = knee(found, config.objectives)
        lines.append(("knee", f"{_values(bend, config.objectives)} (trial {bend.number})"))
    volume = normalised_hypervolume(records, config.objectives, dense, limits)
    among = f" {compared(records, config)}" if several else ""
    hypervolume = "" if volume is None else f", hypervolume {volume:.4f}"
    lines.append(("front", f"{len(found)} candidates{among}{hypervolume}"))
    timed = [
        (record.speed.ratio, record)
        for record in found
        if record.speed and record.speed.ratio and record.speed.conditions and record is not dense
    ]
    if timed:
        _, fastest = max(timed, key=lambda pair: pair[0])
        assert fastest.speed is not None
        where = f"{measured(fastest.speed)} x dense, {printable(str(fastest.speed.conditions))}"
        lines.append(("fastest", f"trial {fastest.number}: {where}"))
    lines += [("limit", line) for line in map(printable, limit_lines(config, records))]
    if siblings:
        lines.append(("siblings", siblings_line(siblings, config.objectives)))
    lines += [("data", line.removeprefix("data: ")) for line in data_lines(records)]
    width = max(len(name) for name, _ in lines) + 2
    text = Text()
    for index, (name, value) in enumerate(lines):
        text.append(f"{name:<{width}}", style="bold").append(value + ("\n" if index + 1 < len(lines) else ""))
    if not several:
        return text
    return Group(text, Text(), rungs_table(records, config), *(Text(one) for one in warnings(records, config)))


def data_lines(records: Iterable[Record]) -> list[str]:
    """Notes on images that were left out, such as "data: 3 of 300 training pictures could not be read".

    At most three, the most common ones, if evaluations differ.
    """
    evaluations = [one for record in records for one in (*record.evaluations, *record.confirmations)]
    found = Counter(note for evaluation in evaluations for note in evaluation.data_notes)
    lines = []
    for note, count in found.most_common(3):
        some = "" if count == len(evaluations) else f" (in {count} of {len(evaluations)} evaluations)"
        lines.append(f"data: {note}{some}")
    return lines


def first_line(evaluation: Evaluation) -> str:
    """The first line of the error of a failed evaluation."""
    return (evaluation.error.splitlines() or ["?"])[0]


def causes(records: Iterable[Record]) -> str:
    """Why candidates failed, such as "oom 2, nan 1"."""
    failures = [record.evaluation for record in records if record.state == "failed"]
    found = Counter((failure and failure.cause) or "error" for failure in failures)
    return ", ".join(f"{cause} {count}" for cause, count in found.most_common())


def comparison_table(dense: Evaluation, pruned: Evaluation) -> Table:
    """A table that compares two complete evaluations with the same metrics."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("metric", "dense", "pruned", "against dense"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    after = dict(pruned.metrics)
    for metric, value in dense.metrics:
        places = decimals(metric, [value, after[metric]])
        cells = [_spread(evaluation, metric, places) for evaluation in (dense, pruned)]
        name = printable(f"{metric} ({unit_of(metric)})" if unit_of(metric) else metric)
        table.add_row(Text(name), *cells, change(metric, after[metric], value))
    if dense.tokens and pruned.tokens:
        ends = dense.tokens[-1], pruned.tokens[-1]
        table.add_row("tokens in the last block", *map(str, ends), f"{ends[1] / ends[0]:.0%}")
    table.caption = "dense: as it comes; a study's front has it after the same fine-tune as the others"
    return table


def front_csv(found: Sequence[Record], objectives: Sequence[Objective], siblings: Sequence[Sibling] = ()) -> str:
    """Records as CSV: trial, uid, origin, metrics, confirmations, speed, training images, tokens per block, schedule.

    siblings: of the study. They come last, without trial and schedule, with the origin "dense sibling: NAME".
    """
    rows = front_rows(found, objectives) + sibling_rows(siblings, found, objectives)
    schedules = [printable(str(record.outcome)) for record in found] + [""] * (len(rows) - len(found))
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    fresh = list(dict.fromkeys(name for row in rows for name in row.get("again", {}).get("metrics", ())))
    columns = [f"{name}_{what}" for name in fresh for what in ("again", "again_spread")]
    columns += ["again_split", "again_seeds"] if fresh else []
    timed = [
        name for name in ("x_dense", "low", "high", "predicted_x_dense") if any(name in _speed(row) for row in rows)
    ]
    columns += [f"speed_{name}" for name in timed]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["trial", "uid", "origin", *names, *columns, "finetuned_images", "tokens", "schedule"]
    writer.writerow(map(printable, header))
    for row, schedule in zip(rows, schedules, strict=True):
        about = [row["trial"], row["uid"], printable(row["origin"])]
        metrics = [row["metrics"].get(name, "") for name in names]
        tokens, again = " ".join(map(str, row["tokens"])), row.get("again", {})
        means = [again.get(what, {}).get(name, "") for name in fresh for what in ("metrics", "spread")]
        means += [again.get(what, "") for what in ("split", "seeds")] if fresh else []
        means += [_speed(row).get(name, "") for name in timed]
        writer.writerow([*about, *metrics, *means, row["finetuned_images"], tokens, schedule])
    return text.getvalue()


def _speed(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The measured speed in a row for JSON; empty when there is none."""
    return row.get("speed", {})


def _what(stage: Stage, unsaid: Collection[str]) -> str:
    if stage.threshold is not None:
        amount = f"> {stage.threshold:.2g}"
    else:
        amount = f"{stage.keep:g}" if stage.keep is not None else f"to {stage.tokens}"
    score = "" if stage.score in unsaid else f" by {stage.score}"
    options = f" with {unusual}" if (unusual := unusual_options(stage)) else ""
    until = "" if stage.until is None else f" until {stage.until}"
    return f"{'pre ' if stage.at == 'pre' else ''}{stage.reduce} {amount}{score}{options}{until}"


def _values(record: Evaluated, objectives: Sequence[Objective]) -> str:
    values = values_of(record)
    return ", ".join(said(objective.metric, values[objective.metric]) for objective in objectives)


def _spread(evaluation: Evaluation, metric: str, places: int) -> str:
    value, spread = dict(evaluation.metrics)[metric], dict(evaluation.spread).get(metric)
    return f"{value:.{places}f}" + (f" ± {spread:.{places}f}" if spread is not None else "")
