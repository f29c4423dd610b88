"""Tables of sensitivities, and of the front that they predict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from prunesearch.evaluate.sensitivity import Effect, Sensitivities
from prunesearch.report.tables import decimals, short, unit_of
from prunesearch.search.sensitivity_front import Predicted
from prunesearch.space.choices import NEVER

CHOICES = ("score", "at", "until")
"""Fields of a stage of which the table shows the best value."""
MILD, HARSH = 0.001, 0.1
"""Values below MILD are green, values above HARSH are red."""
LEAST = 1e-9
"""Smaller values count as this much, because 0 has no logarithm."""


class Line(NamedTuple):
    """The effects of a verb at a block by keep ratio, with its least harmful place, score and return."""

    block: int
    reduce: str
    at: str
    score: str
    until: str
    effects: dict[float, Effect]


def best_lines(found: Sensitivities) -> list[Line]:
    """A line for each block and verb, with the place, score and return of the smallest mean log divergence."""
    lines: defaultdict[tuple[int, str], dict[tuple[str, str, str], dict[float, Effect]]] = defaultdict(dict)
    for effect in found.effects:
        stage = effect.stage
        assert stage.keep is not None, "stages are measured by their keep ratio"
        choice = stage.at, stage.score, str(stage.until or NEVER)
        lines[stage.block, stage.reduce].setdefault(choice, {})[stage.keep] = effect
    best = []
    for (block, reduce), choices in lines.items():
        (at, score, until), effects = min(choices.items(), key=lambda choice: _mean_log(choice[1].values()))
        best.append(Line(block, reduce, at, score, until, effects))
    return best


def keeps_of(found: Sensitivities) -> list[float]:
    """All measured keep ratios, largest first."""
    return sorted({effect.stage.keep or 0.0 for effect in found.effects}, reverse=True)


def sensitivity_table(found: Sensitivities) -> Table:
    """The damage by block, verb (rows) and keep ratio (columns)."""
    several = [_is_chosen(found, name) for name in CHOICES]
    table = _titled(f"Each stage alone: {found.damage}")
    for name, shown in zip(("block", "reduce", *CHOICES), (True, True, *several), strict=True):
        if shown:
            table.add_column(name, justify="right" if name == "block" else "left")
    for keep in keeps_of(found):
        table.add_column(f"{keep:g}", justify="right")
    before: int | None = None
    for line in best_lines(found):
        if before not in (None, line.block):
            table.add_section()
        cells = [str(line.block) if line.block != before else "", line.reduce]
        cells += [getattr(line, name) for name, shown in zip(CHOICES, several, strict=True) if shown]
        table.add_row(*cells, *(_cell(line.effects.get(keep)) for keep in keeps_of(found)))
        before = line.block
    table.caption = Text("\n".join(_notes(found)))
    return table


def predicted_table(starts: Sequence[Predicted], dense: float, metric: str = "gmacs") -> Table:
    """A table of the predicted front. dense: cost of the dense model. metric: the cost."""
    table = _titled("Predicted front, which start_from: [sensitivity] evaluates first")
    places = decimals(metric, [dense])
    for name in (unit_of(metric), "of dense", "predicted damage"):
        table.add_column(name, justify="right")
    table.add_column("schedule", overflow="fold")
    for point in starts:
        share, damage = f"{point.cost / dense:.0%}", f"{point.divergence:.2g}"
        table.add_row(f"{point.cost:.{places}f}", share, damage, Text(short(point.schedule)))
    return table


def _titled(title: str) -> Table:
    style = {"title_justify": "left", "title_style": "bold", "caption_justify": "left"}
    return Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", **style)  # type: ignore[arg-type]


def _notes(found: Sensitivities) -> list[str]:
    notes = [
        f"{found.model.name}, {found.images} training images, {found.seconds:.1f} s on {found.device}",
        f"columns are keep ratios; green: below {MILD:g}, red: above {HARSH:g}, -: not possible alone",
    ]
    if not found.of_features:
        notes.append(f"the dense model gives the class it chooses {found.confidence:.1%} on average")
    choices = [name for name in CHOICES if _is_chosen(found, name)]
    if choices:
        notes.append(f"where there are several, the {', '.join(choices)} that does the least is shown")
    if found.left_out:
        notes.append(left_out(found))
    return notes


def left_out(found: Sensitivities) -> str:
    """A sentence that lists what was not measured."""
    return f"left out, as they say nothing without training: {', '.join(found.left_out)}"


def _is_chosen(found: Sensitivities, field: str) -> bool:
    return len({getattr(effect.stage, field) for effect in found.effects} - {"none"}) > 1


def _cell(effect: Effect | None) -> Text:
    if effect is None:
        return Text("-", style="dim")
    style = "green" if effect.divergence < MILD else "red" if effect.divergence > HARSH else ""
    return Text(_said(effect.divergence), style=style)


def _said(divergence: float) -> str:
    return "0" if divergence == 0 else f"{divergence:.4f}" if divergence >= 1e-4 else f"{divergence:.0e}"


def _mean_log(effects: Iterable[Effect]) -> float:
    values = [math.log(max(effect.divergence, LEAST)) for effect in effects]
    return sum(values) / len(values)
