"""Helpers that all plots share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from apt.evaluate.spread import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 120
_PANELS_IN_A_ROW = 3


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A bar chart of one figure.

    Attributes:
        title: above the bars.
        values: one for each label; None leaves a gap.
        scale: of the axis; "share" goes from 0 to 1. "log" becomes linear unless all values are
            positive.
    """

    title: str
    values: Sequence[Spread | None]
    scale: Literal["linear", "log", "share"] = "linear"


def plot_bars(
    path: Path, labels: Sequence[str], panels: Sequence[Panel], *, colours: Sequence[str]
) -> Path:
    """Draw bars with error bars: a panel for each figure, a bar for each label."""
    columns = min(_PANELS_IN_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(6, 13 * columns / _PANELS_IN_A_ROW), rows * (0.36 * len(labels) + 1.4))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, panel in zip(grid.flat, panels, strict=False):
        _draw_bars(axis, panel, colours)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for row in grid:
        row[0].set_yticks(range(len(labels)), labels, fontsize=9)
    grid[0, 0].invert_yaxis()
    if any(value is None for panel in panels for value in panel.values):
        grid[0, 0].set_ylim(len(labels) - 0.5, -0.5)  # also shows a gap at either end
    return save_figure(figure, path)


def _draw_bars(axis: Axes, panel: Panel, colours: Sequence[str]) -> None:
    shown = [
        (y, value) for y, value in enumerate(panel.values) if value and math.isfinite(value.mean)
    ]
    means = [value.mean for _, value in shown]
    errors = np.asarray([value.known for _, value in shown])
    axis.barh(
        [y for y, _ in shown],
        means,
        xerr=errors,
        color=[colours[y] for y, _ in shown],
        height=0.7,
        capsize=2,
    )
    axis.set_title(panel.title, fontsize=10)
    for (y, value), error in zip(shown, errors, strict=True):
        axis.annotate(
            f"{value.mean:.3g}",
            (value.mean + error, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    if panel.scale == "share":
        axis.set_xlim(0, 1.15)
    elif panel.scale == "log" and means and min(means) > 0:
        logarithmic(axis, "x")
        axis.set_xlim(min(means) / 1.5, max(means) * 3)
    elif means:
        axis.margins(x=0.2)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def logarithmic(axis: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers as ticks: 1, 2, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    scale = axis.xaxis if which == "x" else axis.yaxis
    scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure; the size is in inches."""
    # Slow to import, and only needed once there is something to draw.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, with the same bytes for the same figure; return its path."""
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return path
