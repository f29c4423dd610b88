"""Show a running search: a live view on a terminal, or one line per result elsewhere.

`Progress` collects the events, `view` and `line` render it, and `LiveReport` connects them to a console.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prunesearch.config import StudyConfig
from prunesearch.front import dense_of, front, highest_rung, normalised_hypervolume, values_of
from prunesearch.printable import printable
from prunesearch.record import Record
from prunesearch.relative_limits import limits_of
from prunesearch.report.rung_tables import compared, rungs_table, seconds_of, warnings, work_left
from prunesearch.report.tables import causes, decimals, first_line, front_table, said, short
from prunesearch.search.confirm import Confirmed
from prunesearch.search.events import (
    Checked,
    Done,
    Event,
    Finished,
    LookingAtData,
    Reason,
    Retrying,
    Started,
    Stopping,
    Submitted,
    Timing,
    Waiting,
)
from prunesearch.search.shared_weights import SupernetTrained
from prunesearch.search.siblings import SiblingMeasured
from prunesearch.search.speed import Timed

ROWS = 8
"""Most rows of the front in the live view."""
WINDOW = 20
"""Number of latest results over which the change of the hypervolume is shown."""

_WHY: dict[Reason, str] = {
    "trials": "all candidates of stop.trials are done",
    "hours": "stop.hours are over",
    "exhausted": "no further candidate was found within the space and its limits",
    "hopeless": "every candidate failed",
    "dense": "the dense model failed, to which a limit is relative",
    "disk": "no space is left",
    "interrupted": "interrupted; run it again to continue",
    "cancelled": "cancelled; run it again to continue",
}


@dataclass
class Progress:
    """State of a running search, collected from events.

    records: candidates with a result, by number, ordered by their latest result. running: number -> (record, attempt,
    start time). seconds: evaluation time of this run, of all workers together. gain: change of the hypervolume `volume`
    over the last WINDOW results.
    """

    config: StudyConfig
    where: str
    begun: float
    workers: str = ""
    total: int | None = None
    records: dict[int, Record] = field(default_factory=dict)
    running: dict[int, tuple[Record, int, float]] = field(default_factory=dict)
    seconds: float = 0.0
    rejected: int = 0
    note: str = ""
    done: Done | None = None
    front: list[Record] = field(default_factory=list)
    volume: float | None = None
    gain: float | None = None

    def add(self, event: Event, now: float) -> None:
        """Process an event. now: seconds of the same clock as `begun`."""
        if isinstance(event, Started):
            self.begun, self.workers, self.total, self.note = now, event.workers, event.total, ""
            known = sorted((record for record in event.records if record.evaluations), key=_when)
            self.records = {record.number: record for record in known}
            self._judge()
        elif isinstance(event, Submitted | Retrying):
            self.running[event.record.number] = (event.record, event.attempt, now)
            if isinstance(event, Retrying):
                self.note = f"trial {event.record.number} again: {event.why}"
        elif isinstance(event, Finished):
            self.running.pop(event.record.number, None)
            self.records.pop(event.record.number, None)  # reinserted at the end
            self.records[event.record.number] = event.record
            self.seconds += seconds_of(event.evaluation)
            self.rejected = event.rejected
            if event.evaluation.status == "failed":
                self.note = (
                    f"trial {event.record.number} failed ({event.evaluation.cause}): {first_line(event.evaluation)}"
                )
            self._judge()
        elif isinstance(event, Checked):
            self.note = f"{self.config.name}: no mistakes in the study file; loading PyTorch, data and weights"
        elif isinstance(event, LookingAtData):
            of = "" if event.total is None else f" of {event.total:,}"
            self.note = f"looking at the {event.split} pictures: {event.done:,}{of}"
        elif isinstance(event, Waiting):
            self.note = f"waiting for the storage ({event.why}), for {duration(event.waited)} so far"
        elif isinstance(event, SupernetTrained):
            self.note = f"shared weights: {event.images:,} of {event.total:,} images ({duration(now - self.begun)})"
        elif isinstance(event, SiblingMeasured):
            self.note = f"dense sibling {event.done} of {event.total}: {event.sibling.name} {self._measured(event)}"
        elif isinstance(event, Confirmed):
            self.note = (
                f"measured again: {event.done} of {event.total}, trial {event.record.number} {self._again(event)}"
            )
        elif isinstance(event, Timed):
            timed = sum(speed.ratio is not None for speed in event.evaluation.speeds)
            self.note = f"timed in turns: {timed} models, the dense one among them"
            if event.evaluation.status == "failed":
                self.note = f"not timed ({event.evaluation.cause}): {first_line(event.evaluation)}"
        elif isinstance(event, Timing):
            self.note = "timing schedules in turns with the dense model, on one worker; the others are closed"
        elif isinstance(event, Stopping):
            waits = f"; {event.running} running are waited for" if event.running else ""
            self.note = f"stopping: {event.why}{waits}"
        elif isinstance(event, Done):
            self.done, self.note, self.rejected = event, "", event.rejected
            self.running.clear()

    def _measured(self, event: SiblingMeasured | Confirmed) -> str:
        """What an evaluation beside the search measured."""
        metric = self.config.objectives[0].metric
        if event.evaluation.status == "failed":
            return f"failed ({event.evaluation.cause}): {first_line(event.evaluation)}"
        return f"{metric} {event.evaluation.value(metric):.5g}"

    def _again(self, event: Confirmed) -> str:
        """What a confirmation measured, beside what the search had measured."""
        metric = self.config.objectives[0].metric
        if event.evaluation.status == "failed":
            return self._measured(event)
        before = values_of(event.record).get(metric, math.nan)
        return f"{self._measured(event)} (in the search {before:.5g})"

    def _judge(self) -> None:
        records, config = list(self.records.values()), self.config
        rung, dense, limits = highest_rung(records), dense_of(records), limits_of(config, records)
        records = [record for record in records if record.rung_done == rung]
        self.front = front(records, config.objectives, limits)
        self.volume = normalised_hypervolume(records, config.objectives, dense, limits)
        before = normalised_hypervolume(records[:-WINDOW], config.objectives, dense, limits)
        known = self.volume is not None and before is not None and len(records) > WINDOW
        self.gain = (self.volume or 0.0) - (before or 0.0) if known else None


class LiveReport:
    """Shows a search while it runs: `with LiveReport(...) as report: run_study(..., on_event=report)`.

    where: the study's folder or storage, for the header. plain: print lines even on a terminal.
    """

    def __init__(self, config: StudyConfig, where: str, *, console: Console, plain: bool = False) -> None:
        self.console = console
        self.progress = Progress(config, where, begun=time.monotonic())
        self._live: Live | None = None
        if console.is_terminal and not plain:
            self._live = Live(get_renderable=self._view, console=console, refresh_per_second=2)

    def __enter__(self) -> LiveReport:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        self.progress.add(event, time.monotonic())
        text = line(self.progress, event)
        if self._live is None and text:
            self.console.print(Text(printable(text)), soft_wrap=True)
        if self._live is None and isinstance(event, Done) and _several(self.progress):
            records = list(self.progress.records.values())
            self.console.print(rungs_table(records, self.progress.config))
            for warning in warnings(records, self.progress.config):
                self.console.print(Text(warning), soft_wrap=True)

    def _view(self) -> RenderableType:
        return view(self.progress, time.monotonic())


def view(progress: Progress, now: float) -> RenderableType:
    """The live view at a moment."""
    parts: list[RenderableType] = [_header(progress, now)]
    if progress.note:
        parts.append(Text(printable(progress.note), style="yellow", no_wrap=True, overflow="ellipsis"))
    if progress.running:
        parts.append(_running(progress, now))
    if _several(progress):
        parts += [Text(), rungs_table(_all(progress), progress.config)]
        parts += [Text(text, style="yellow") for text in warnings(list(progress.records.values()), progress.config)]
    if progress.front:
        parts.append(Text())
        parts.append(_front(progress))
    return Group(*parts)


def line(progress: Progress, event: Event) -> str:
    """The log line of an event that `progress` has already processed; "" for none."""
    if isinstance(event, Started):
        return _started(progress, event)
    if isinstance(event, Finished):
        return _result(progress, event)
    if isinstance(event, Done):
        return _ended(event)
    return "" if isinstance(event, Submitted) else progress.note


def duration(seconds: float) -> str:
    """A duration as text: "42 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def seconds_left(progress: Progress, now: float) -> float | None:
    """Estimated seconds until `stop` ends the search, from the pace of this run; None while unknown."""
    bounds = []
    records, total = list(progress.records.values()), progress.total
    work = None if total is None else work_left(records, progress.config, total)
    if work is not None and progress.seconds:
        bounds.append(work * (now - progress.begun) / progress.seconds)
    if progress.config.stop.hours is not None:
        bounds.append(max(3600 * progress.config.stop.hours - (now - progress.begun), 0.0))
    return min(bounds, default=None)


# --- parts -------------------------------------------------------------------------------------------------------


def _header(progress: Progress, now: float) -> RenderableType:
    name = Text(printable(progress.config.name), style="bold", no_wrap=True, overflow="ellipsis")
    what = f"{progress.config.model.name} on {progress.config.data.name} -> {progress.where}"
    about = [what, progress.workers or "starting workers", duration(now - progress.begun)]
    name.append("  " + printable(" · ".join(about)), style="not bold dim")
    if progress.done is not None:
        return Group(name, Text(_ended(progress.done)))
    done = len(progress.records)
    failed = sum(record.state == "failed" for record in progress.records.values())
    total = f"/{progress.total}" if progress.total is not None else ""
    measured = sum(len(record.evaluations) for record in progress.records.values())
    what = f"candidates, {measured} evaluations" if _several(progress) else "done"
    counts = [
        f"{done}{total} {what}",
        f"{failed} failed" + (f" ({causes(progress.records.values())})" if failed else ""),
    ]
    counts.append(f"{progress.rejected} rejected")
    left = seconds_left(progress, now)
    if left is not None:
        counts.append(f"about {duration(left)} left")
    numbers = Text(" · ".join(counts), no_wrap=True, overflow="ellipsis")
    if not progress.total:
        return Group(name, numbers)
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=progress.total, completed=min(done, progress.total), width=20), numbers)
    return Group(name, row)


def _running(progress: Progress, now: float) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for record, attempt, since in progress.running.values():
        again = f", rung {record.rung}" if _several(progress) else ""
        again += f" (attempt {attempt + 1})" if attempt else ""
        row = [
            f"trial {record.number}",
            duration(now - since),
            printable(record.origin) + again,
            short(record.schedule),
        ]
        table.add_row(*map(Text, row))
    return table


def _front(progress: Progress) -> Table:
    found = progress.front
    records = list(progress.records.values())
    size = f"front: {len(found)}" + (f" ({ROWS} shown)" if len(found) > ROWS else "")
    among = " ".join(part for part in (size, compared(records, progress.config)) if part)
    title = ", ".join(part for part in (among, _volume(progress)) if part)
    return front_table(found, progress.config.objectives, records, title=title, most=ROWS)


def _several(progress: Progress) -> bool:
    return len(progress.config.rungs) > 1


def _all(progress: Progress) -> list[Record]:
    """Records with a result, and running ones in state "running"."""
    running = {number: replace(record, state="running") for number, (record, _, _) in progress.running.items()}
    return list({**progress.records, **running}.values())


def _when(record: Record) -> tuple[int, int]:
    return max(record.orders, default=0), record.number


def _volume(progress: Progress) -> str:
    if progress.volume is None:
        return ""
    gain = "" if progress.gain is None else f" ({progress.gain:+.4f} in the last {WINDOW} results)"
    return f"hypervolume {progress.volume:.4f}{gain}"


# --- lines -------------------------------------------------------------------------------------------------------


def _started(progress: Progress, event: Started) -> str:
    config, total = progress.config, "" if event.total is None else f" of {event.total}"
    what = f"{config.model.name} on {config.data.name} -> {progress.where}, {event.workers}"
    if not event.records:
        return f"{config.name}: starting, {what}"
    counts = f"{event.done}{total} done, {event.rerun} to run again, {event.recovered} recovered"
    return f"{config.name}: continuing ({counts}), {what}"


def _result(progress: Progress, event: Finished) -> str:
    record, evaluation = event.record, event.evaluation
    total = "" if progress.total is None else f"/{progress.total}"
    head = f"{len(progress.records)}{total}  trial {record.number}"
    seconds = f"{seconds_of(evaluation):.1f} s"
    if evaluation.status == "failed":
        return f"{head}  failed ({evaluation.cause}): {first_line(evaluation)}  {seconds}"
    values = [values_of(other) for other in progress.records.values()]
    shown = []
    for objective in progress.config.objectives:
        metric = objective.metric
        places = decimals(metric, [other[metric] for other in values if metric in other])
        shown.append(said(metric, evaluation.value(metric), places))
    star = "*" if any(other.number == record.number for other in progress.front) else " "
    what = f"rung {evaluation.rung}" if _several(progress) else "complete"
    return f"{head}  {what}  {'  '.join(shown)}  {seconds}  {star} {short(record.outcome)}"


def _ended(event: Done) -> str:
    running = f", {event.running} running" if event.running else ""
    paused = f", {event.paused} at lower rungs" if event.paused else ""
    counts = f"{event.complete} complete{paused}, {event.failed} failed{running}, {event.rejected} rejected"
    return f"{counts} in {duration(event.seconds)}: {_WHY[event.reason]}"
