"""What all plots share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 120


def logarithmic(axis: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers: 1, 2, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    scale = axis.xaxis if which == "x" else axis.yaxis
    scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    # Slow to import, and only needed once there is something to draw.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG that is the same bytes for the same figure; returns its path."""
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return path
