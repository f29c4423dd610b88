"""Plot a device profile: milliseconds of a block's halves against tokens, and what stages add."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prunesearch.printable import counted
from prunesearch.profile import Curve, Profile
from prunesearch.report.plot import BLUE, GREEN, GREY, INK, ORANGE, check_plot, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (
    ("attention", "attention", BLUE, "o"),
    ("sized_attention", "attention with sizes", GREEN, "s"),
    ("mlp", "MLP", ORANGE, "^"),
)


def plot_profile(profiles: Sequence[Profile], path: str | Path) -> None:
    """Plot one row for each batch size: left the time of one block against tokens, right that of each verb and score.

    path: .png, .pdf or .svg. Raises as `check_plot`.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 3.6 * len(profiles)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(profiles), 2, squeeze=False, width_ratios=(1.5, 1))
    for (left, right), profile in zip(axes, profiles, strict=True):
        _curves(left, profile)
        _stages(right, profile)
    first = profiles[0]
    threads = f", {counted(first.threads, 'thread')}" if first.threads else ""
    title = f"{first.model}: {first.runtime} on {first.device}{threads}, {first.precision}"
    figure.suptitle(title, x=0.014, ha="left", fontsize=13, color=INK, parse_math=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _curves(axis: Axes, profile: Profile) -> None:
    quiet(axis)
    for name, label, colour, marker in CURVES:
        curve: Curve | None = getattr(profile, name)
        if curve is not None:
            label = "MLP, others held" if profile.shape.holds else label
            axis.plot(curve.tokens, curve.ms, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("tokens, class token and registers included", color=INK)
    axis.set_ylabel("ms of one block", color=INK)
    axis.set_title(f"batch {profile.batch}: dense {profile.dense_ms:.3g} ms", loc="left", fontsize=11, color=INK)
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")


def _stages(axis: Axes, profile: Profile) -> None:
    """What a stage adds that keeps 70 % of all patch tokens."""
    quiet(axis)
    tokens = profile.shape.patch_tokens
    rows = [(time.name, max(time.at(tokens, round(0.7 * tokens)), 0.0), BLUE) for time in profile.verbs]
    rows += [(time.name, max(time.at(tokens, 0), 0.0), GREY) for time in profile.scores]
    names = [name for name, _, _ in rows]
    axis.barh(range(len(rows)), [ms for _, ms, _ in rows], color=[colour for _, _, colour in rows], height=0.6)
    axis.set_yticks(range(len(rows)), names, fontsize=8.5, color=INK)
    axis.invert_yaxis()
    axis.set_xlabel("ms that a stage adds (blue: verb, grey: score)", color=INK)
    axis.set_title("one stage that keeps 70 % of all patches", loc="left", fontsize=11, color=INK)
