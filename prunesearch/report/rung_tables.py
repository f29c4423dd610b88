"""Several rungs at a glance: how many candidates are at which, and whether small budgets tell what large ones will."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from prunesearch.config import StudyConfig
from prunesearch.evaluate.task import Evaluation
from prunesearch.front import comparable, highest_rung
from prunesearch.record import Record
from prunesearch.search.agreement import Agreement, agreements


def rungs_table(records: Sequence[Record], config: StudyConfig) -> Table:
    """A row for each rung. Records include running ones. Correlations: overall, and within each third of the range of
    costs, cheapest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("rung", "images", "done", "went on", "waiting", "running", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rank correlation with\nthe next (by cost)")
    found = agreements(records, config.objectives, len(config.rungs))
    for rung, budget in enumerate(config.rungs):
        there = [record for record in records if record.at(rung) is not None]
        went_on = sum(record.rung > rung for record in there)
        waiting = sum(record.state == "paused" and record.rung == rung for record in there)
        running = sum(record.state == "running" and record.rung == rung for record in records)
        failed = sum(record.state == "failed" and record.rung == rung for record in records)
        is_last = rung == len(config.rungs) - 1
        counts = (len(there), "" if is_last else went_on, "" if is_last else waiting, running, failed)
        said = "\n".join(_said(one) for one in found if one.rung == rung and one.tau is not None)
        table.add_row(str(rung), f"{budget.images:,}", *map(str, counts), Text("the front" if is_last else said))
    return table


def warnings(records: Sequence[Record], config: StudyConfig) -> list[str]:
    """What the user should do about rungs that do not agree."""
    return [
        f"rung {one.rung} says little about rung {one.rung + 1}: Kendall's tau of {one.metric} is {one.tau:.2f} over "
        f"{one.pairs} candidates, under 0.5. Raise rungs[{one.rung}].images in the next study."
        for one in agreements(records, config.objectives, len(config.rungs))
        if one.is_low
    ]


def compared(records: Sequence[Record], config: StudyConfig) -> str:
    """Among whom the front was found, such as "of 5 at rung 2"; "" for a study with one rung."""
    last, rung = len(config.rungs) - 1, highest_rung(records)
    if last == 0:
        return ""
    there = f"of {len(comparable(records, config.objectives))} at rung {rung}"
    return there if rung == last else f"{there}; rung {last} has no result yet"


def work_left(records: Sequence[Record], config: StudyConfig, total: int) -> float | None:
    """Seconds of evaluation, of all workers together, until a study has so many candidates and nobody goes on any
    more; None as long as a rung that will be needed has no result."""
    spent: dict[int, list[float]] = {}
    for record in records:
        for evaluation in record.evaluations:
            spent.setdefault(evaluation.rung, []).append(seconds_of(evaluation))
    starts = min(1 + len(config.space.start_from), total)
    work, expected = 0.0, total
    for rung in range(len(config.rungs)):
        known = spent.get(rung, [])
        if expected > 0 and not known:
            return None
        work += max(expected - len(known), 0) * sum(known) / len(known)
        expected = max(expected // config.promote, starts)
    return work


def seconds_of(evaluation: Evaluation) -> float:
    """How long an evaluation took."""
    return sum(seconds for _, seconds in evaluation.seconds)


def _said(one: Agreement) -> str:
    bands = " ".join("-" if tau is None else f"{tau:.2f}" for tau in one.bands)
    return f"{one.metric} {one.tau:.2f} ({bands})"
