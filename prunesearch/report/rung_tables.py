"""Tables and warnings of a study with several rungs: candidates per rung, rank correlation between rungs."""

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
    """A table with a row for each rung.

    Correlations are shown over all costs and, in parentheses, within each third of the range of costs, cheapest first.

    records: running ones included.
    """
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
    """A warning, with advice, for each pair of rungs whose rank correlation is low."""
    return [
        f"rung {one.rung} says little about rung {one.rung + 1}: Kendall's tau of {one.metric} is {one.tau:.2f} over "
        f"{one.pairs} candidates, under 0.5. Raise rungs[{one.rung}].images in the next study."
        for one in agreements(records, config.objectives, len(config.rungs))
        if one.is_low
    ]


def compared(records: Sequence[Record], config: StudyConfig) -> str:
    """Text for the candidates that the front was taken from, such as "of 5 at rung 2"; "" for one rung."""
    last, rung = len(config.rungs) - 1, highest_rung(records)
    if last == 0:
        return ""
    there = f"of {len(comparable(records, config.objectives))} at rung {rung}"
    return there if rung == last else f"{there}; rung {last} has no result yet"


def work_left(records: Sequence[Record], config: StudyConfig, total: int) -> float | None:
    """Estimated seconds of evaluation left, of all workers together, for a study with `total` candidates.

    None while a rung that is needed has no result yet.
    """
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
    """Total seconds of an evaluation."""
    return sum(seconds for _, seconds in evaluation.seconds)


def _said(one: Agreement) -> str:
    bands = " ".join("-" if tau is None else f"{tau:.2f}" for tau in one.bands)
    return f"{one.metric} {one.tau:.2f} ({bands})"
