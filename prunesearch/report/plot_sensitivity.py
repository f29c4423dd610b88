"""Plot sensitivities: the KL divergence of each verb by block and keep ratio, on a logarithmic scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunesearch.evaluate.sensitivity import Sensitivities
from prunesearch.report.plot import GREY, INK, check_plot, quiet
from prunesearch.report.sensitivity_tables import LEAST, Line, best_lines, keeps_of, left_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3


def plot_sensitivity(found: Sensitivities, path: str | Path) -> None:
    """Plot one panel per verb, with one line per keep ratio over the blocks.

    If the space has several scores or places, the least harmful ones at each block are plotted. Raises as `check_plot`.

    path: .png, .pdf or .svg.
    """
    check_plot(path)
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines, keeps = best_lines(found), keeps_of(found)
    verbs = list(dict.fromkeys(line.reduce for line in lines))
    shades = colormaps["viridis"](np.linspace(0.88, 0.02, len(keeps)))
    colours = dict(zip(keeps, shades, strict=True))
    columns = min(len(verbs), COLUMNS if len(verbs) != 4 else 2)
    rows = math.ceil(len(verbs) / columns)
    figure = Figure(figsize=(10, 2.6 + 2.6 * rows), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, verb in zip(axes, verbs, strict=False):
        quiet(axis)
        _panel(axis, [line for line in lines if line.reduce == verb], colours)
        axis.set_title(verb, loc="left", fontsize=11, color=INK, fontweight="bold", parse_math=False)
    for axis in axes[len(verbs) :]:
        axis.set_visible(False)
    blocks = sorted({line.block for line in lines})
    axes[0].set_yscale("log")
    axes[0].set_xticks(blocks[:: math.ceil(len(blocks) / 12)])
    figure.supxlabel("block of the only stage", fontsize=10.5, color=INK)
    figure.supylabel(found.damage, fontsize=10.5, color=INK)
    title = f"{found.model.name}: each stage alone, without training, on {found.images} training images"
    figure.suptitle(title, x=0.014, ha="left", fontsize=13, color=INK, parse_math=False)
    handles, names = _legend(axes[: len(verbs)])
    figure.legend(handles, names, title="keep", loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    if found.left_out:
        figure.text(0.014, 0.002, left_out(found), fontsize=8.5, color=GREY)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axis: Axes, lines: list[Line], colours: dict[float, Any]) -> None:
    for keep, colour in colours.items():
        there = [line for line in lines if keep in line.effects]
        if not there:
            continue
        values = [max(line.effects[keep].divergence, LEAST) for line in there]
        blocks = [line.block for line in there]
        axis.plot(blocks, values, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=f"{keep:g}")


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Legend entries: each keep ratio once, the smallest first, in the order of the curves from top to bottom."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    names = sorted(entries, key=float)
    return [entries[name] for name in names], names
