"""Plot a study: quality against each cost, and the tokens after each block of schedules on the front.

Uses the Okabe-Ito palette, which is safe for colour-blind readers, and a different marker for each meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prunesearch.config import Objective
from prunesearch.confirmation import confirmation_of
from prunesearch.errors import StudyError, UserError
from prunesearch.evaluate.limits import Limits
from prunesearch.extras import need
from prunesearch.front import comparable, comparable_siblings, front, values_of
from prunesearch.record import Record, Sibling
from prunesearch.report.tables import evenly, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, FAINT = "#222222", "#8a8a8a", "#dddddd"
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
CURVES = 5
"""Most schedules of the front whose tokens are drawn."""
_NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "gmacs": "cost of one image",
    "latency_ms": "latency of one image",
    "predicted_latency_ms": "predicted time of a batch",
    "peak_memory_mb": "peak memory",
}
_OFFSETS: list[tuple[int, int, Literal["left", "center", "right"], Literal["bottom", "center", "top"]]] = [
    (-7, 6, "right", "bottom"),
    (0, 9, "center", "bottom"),
    (-9, 0, "right", "center"),
    (7, 6, "left", "bottom"),
    (9, 0, "left", "center"),
    (7, -7, "left", "top"),
    (0, -9, "center", "top"),
    (-7, -7, "right", "top"),
]
"""Possible positions of a label relative to its marker, in points, preferred ones first. Above the front is room."""


@dataclass(frozen=True)
class _Picture:
    """The data of a figure. colours: trial number -> colour, for schedules of the front whose tokens are drawn."""

    records: list[Record]
    front: list[Record]
    quality: Objective
    limits: Limits
    colours: dict[int, Any]
    siblings: list[Sibling]

    @property
    def curves(self) -> list[Record]:
        return [record for record in self.front if record.number in self.colours]

    @property
    def named(self) -> list[tuple[Record | Sibling, str, Any]]:
        """What has a label in the scatter plot, the longest labels first: (record or sibling, label, colour)."""
        shown = [record for record in self.records if record.origin != "sampler" or record.number in self.colours]
        siblings = [(sibling, name, PURPLE) for sibling, name in zip(self.siblings, self._sibling_names(), strict=True)]
        return [*siblings, *((record, _name(record), self.colour(record)) for record in shown)]

    def _sibling_names(self) -> list[str]:
        """The names without tags of weights, where that is enough to tell them apart."""
        short = [sibling.short_name for sibling in self.siblings]
        return [one.short_name if short.count(one.short_name) == 1 else one.name for one in self.siblings]

    def colour(self, record: Record) -> Any:
        special = {"dense": ORANGE, "start": GREEN}.get(record.origin.partition(":")[0])
        return special or self.colours.get(record.number, BLUE)

    def places(self, records: Sequence[Record | Sibling], cost: Objective | None) -> np.ndarray:
        """Coordinates of records in a panel: (records, 2).

        cost None: the x axis is the trial number, and dense siblings are right of the last trial.
        """
        x = [self._trial(record) if cost is None else values_of(record)[cost.metric] for record in records]
        return np.array([x, [values_of(record)[self.quality.metric] for record in records]], dtype=np.float64).T

    def _trial(self, record: Record | Sibling) -> int:
        if isinstance(record, Record):
            return record.number
        return max(other.number for other in self.records) + 1 + self.siblings.index(record)

    def staircase(self, cost: Objective) -> np.ndarray:
        """The front in quality and this cost alone, as a step line: (corners, 2).

        With more than two objectives some points of the full front are not on it.
        """
        corners = self.places(front(self.front, [self.quality, cost]), cost)  # from the cheapest on
        bends = np.stack([corners[1:, 0], corners[:-1, 1]], axis=1)
        line = np.empty((2 * len(corners) - 1, 2))
        line[::2], line[1::2] = corners, bends
        return line


def plot_front(
    records: Sequence[Record],
    objectives: Sequence[Objective],
    path: str | Path,
    *,
    limits: Limits = (),
    title: str = "",
    siblings: Sequence[Sibling] = (),
) -> None:
    """Plot the complete candidates, the front, the dense model, the start schedules and the dense siblings.

    The y axis is the first objective to maximize (else the first objective). Each other objective has its own panel. A
    single objective is plotted over the trial numbers. Raises StudyError when no candidate is complete, and as
    `check_plot`.

    path: .png (1600 x 1000 pixels), .pdf or .svg.
    """
    check_plot(path)
    from matplotlib import rc_context

    goals = [objective.goal for objective in objectives]
    quality = objectives[goals.index("maximize") if "maximize" in goals else 0]
    costs: list[Objective | None] = [objective for objective in objectives if objective is not quality] or [None]
    shown = comparable(records, objectives)
    if not shown:
        raise StudyError("plot: no candidate is complete. Possible: a study with one. Run the search longer.")
    found = front(shown, objectives, limits)
    picture = _Picture(shown, found, quality, limits, _colours(found), comparable_siblings(siblings, objectives))
    with rc_context({"text.parse_math": False}):  # a $ in a name does not start a formula
        figure = _figure(picture, costs, title)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def check_plot(path: str | Path) -> None:
    """Raise UserError when the suffix is not .png, .pdf or .svg, MissingLibraryError without matplotlib."""
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"plot {path}: its suffix says no format. Possible: .png, .pdf, .svg. Give it one of them.")
    need(f"plot {path}", "plot", "matplotlib")


# --- panels ------------------------------------------------------------------------------------------------------


def _figure(picture: _Picture, costs: Sequence[Objective | None], title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
    figure = Figure(figsize=(10, 6.25), dpi=160, layout=layout)
    FigureCanvasAgg(figure)
    widths = [1.0] * len(costs) + ([0.3 + 0.32 * len(costs)] if picture.curves else [])
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axis in axes:
        quiet(axis)
    for axis, cost in zip(axes, costs, strict=False):
        _scatter(axis, picture, cost)
    if picture.curves:
        _tokens(axes[-1], picture)
    counts = f"{len(picture.records)} candidates, {len(picture.front)} on the front"
    figure.suptitle(f"{title}: {counts}" if title else counts, x=0.014, ha="left", fontsize=13, color=INK)
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower left", ncols=len(names), frameon=False, fontsize=9, labelcolor=INK)
    figure.draw_without_rendering()  # makes the layout final, on which the labels depend
    figure.set_layout_engine("none")
    for axis, cost in zip(axes, costs, strict=False):
        _label(axis, picture, cost)
    return figure


def _scatter(axis: Axes, picture: _Picture, cost: Objective | None) -> None:
    def draw(records: Sequence[Record | Sibling], size: float, color: Any, **style: Any) -> None:
        if records:
            x, y = picture.places(records, cost).T
            axis.scatter(x, y, s=size, color=color, **style)

    on_front = {record.number for record in picture.front}
    starts = [record for record in picture.records if record.origin.startswith("start: ")]
    dense = [record for record in picture.records if record.origin == "dense"]
    searched = [record for record in picture.records if record.origin == "sampler" and record.number not in on_front]
    best = [record for record in picture.front if record.origin != "dense"]
    _again(axis, picture, cost)
    draw(searched, 26, GREY, alpha=0.45, linewidths=0, label="candidate")
    if cost is not None and picture.front:
        axis.plot(*picture.staircase(cost).T, color=BLUE, linewidth=1.6, zorder=2)
    draw(best, 46, BLUE, edgecolors="white", linewidths=0.9, zorder=4, label="front")
    for record in picture.curves:
        if record.origin != "dense":
            draw([record], 74, picture.colours[record.number], edgecolors="white", linewidths=1.0, zorder=5)
    draw(starts, 64, GREEN, marker="D", facecolors="none", linewidths=1.6, zorder=6, label="start schedule")
    style = {"facecolors": "none", "linewidths": 1.8, "zorder": 6}
    draw(picture.siblings, 64, PURPLE, marker="s", label="dense sibling, as it comes", **style)
    draw(dense, 210, ORANGE, marker="*", edgecolors="white", linewidths=0.9, zorder=7, label="dense model")
    for record in dense:
        level = values_of(record)[picture.quality.metric]
        axis.axhline(level, color=ORANGE, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    for name, limit in picture.limits:
        for bound in (limit.at_most, limit.at_least):
            if bound is not None and name in (picture.quality.metric, cost and cost.metric):
                across = axis.axhline if name == picture.quality.metric else axis.axvline
                across(bound, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1, label=f"limit of {name}")
    axis.margins(0.07, 0.09)
    axis.set_ylabel(_axis_name(picture.quality.metric))
    axis.set_xlabel("trial" if cost is None else _axis_name(cost.metric))


def _again(axis: Axes, picture: _Picture, cost: Objective | None) -> None:
    """Draw confirmations (mean and spread over fresh seeds), each connected to the search's own value by a line."""
    label: str | None = "measured again, with fresh seeds"
    for record in picture.records:
        again, quality = confirmation_of(record), picture.quality.metric
        if again is None:
            continue
        x, before = picture.places([record], cost)[0]
        x_again = x if cost is None else again.mean[cost.metric]
        axis.plot([x, x_again], [before, again.mean[quality]], color=GREY, linewidth=0.9, zorder=3)
        axis.errorbar(
            x_again, again.mean[quality], again.spread.get(quality), fmt="o", ms=5, color=INK, mfc="white", mew=1.1,
            elinewidth=1.1, capsize=2, zorder=3, label=label,
        )  # fmt: skip
        label = None


def _tokens(axis: Axes, picture: _Picture) -> None:
    known = [_tokens_of(record) for record in picture.records if _tokens_of(record)]
    start, depth = max(map(max, known)), max(map(len, known))
    ends = _apart([_tokens_of(record)[-1] for record in picture.curves], 0.04 * start)
    for record, end in zip(picture.curves, ends, strict=True):
        colour = picture.colours[record.number]
        axis.stairs(_tokens_of(record), baseline=None, color=colour, linewidth=1.8)
        axis.text(depth * 1.02, end, _name(record), color=colour, fontsize=8.5, va="center", fontweight="bold")
    axis.set_xlim(0, depth)
    axis.set_ylim(0, 1.06 * start)
    shown = range(0, depth, math.ceil(depth / 12))
    axis.set_xticks([block + 0.5 for block in shown], [str(block) for block in shown])
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("block")
    axis.set_ylabel("tokens after the block")


def _label(axis: Axes, picture: _Picture, cost: Objective | None) -> None:
    """Place the labels. Each one takes the position where it hides the fewest points."""
    in_the_way = [axis.transData.transform(picture.places([*picture.records, *picture.siblings], cost))]
    if cost is not None and picture.front:
        corners = axis.transData.transform(picture.staircase(cost))
        steps = np.linspace(0, len(corners) - 1, 40 * len(corners))
        in_the_way.append(np.stack([np.interp(steps, range(len(corners)), column) for column in corners.T], axis=1))
    dots = np.concatenate(in_the_way)
    window = axis.get_window_extent()
    taken: list[Any] = []
    for record, name, colour in picture.named:
        place = picture.places([record], cost)[0]
        tried = []
        for rank, (dx, dy, horizontal, vertical) in enumerate(_OFFSETS):
            text = axis.annotate(
                name, place, (dx, dy), textcoords="offset points", ha=horizontal, va=vertical, zorder=8
            )
            text.set(color=colour, fontsize=8.5, fontweight="bold")
            area = text.get_window_extent().padded(2)
            hidden = int(((dots > area.min) & (dots < area.max)).all(axis=1).sum())
            outside = not (window.x0 < area.x0 and area.x1 < window.x1 and window.y0 < area.y0 and area.y1 < window.y1)
            tried.append((outside + sum(map(area.overlaps, taken)), hidden, rank, area, text))
        tried.sort(key=lambda trial: trial[:3])
        taken.append(tried[0][3])
        for *_, text in tried[1:]:
            text.remove()


def quiet(axis: Axes) -> None:
    """Style axes unobtrusively: no top and right spines, light grid, small ticks."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelcolor=INK, labelsize=9, color=GREY)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=INK, fontsize=10.5)


# --- names and colours -------------------------------------------------------------------------------------------


def _colours(found: Sequence[Record]) -> dict[int, Any]:
    """Colours for at most CURVES records, spread over the front, with different tokens: trial number -> colour."""
    import matplotlib

    different: list[Record] = []
    for record in reversed(found):  # from the most expensive one, so that of equal ones the most expensive is kept
        if _tokens_of(record) and all(_tokens_of(record) != _tokens_of(other) for other in different):
            different.insert(0, record)
    chosen = evenly(different, CURVES)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.02, 0.68, len(chosen)))
    return {record.number: shade for record, shade in zip(chosen, shades, strict=True)}


def _apart(values: Sequence[float], distance: float) -> list[float]:
    """Move values upwards until they are at least `distance` apart. Keeps their order."""
    placed = [0.0] * len(values)
    last = -math.inf
    for index in sorted(range(len(values)), key=lambda index: values[index]):
        last = placed[index] = max(values[index], last + distance)
    return placed


def _name(record: Record) -> str:
    return f"#{record.number}" if record.origin == "sampler" else record.origin.removeprefix("start: ")


def _tokens_of(record: Record) -> tuple[int, ...]:
    return record.evaluation.tokens if record.evaluation is not None else ()


def _axis_name(metric: str) -> str:
    name, unit = _NAMES.get(metric, metric.replace("_", " ")), unit_of(metric)
    return f"{name} ({unit})" if unit else name
