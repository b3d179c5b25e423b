"""The plots of the digits report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from apt.evaluate.bars import ZERO_LOSS
from apt.evaluate.measure import spread, summarise
from apt.evaluate.methods import APT, CONSISTENCY, DIFFUSION_GUIDED, NO_REGULARISER
from apt.evaluate.results import LossCurve, MethodResult, Progress, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "diffusion": "#4c78a8",
    "consistency": "#e39c37",
    "apt": "#2e8b57",
    "ablation": "#9cc7ac",
    "real": "#777777",
}
_DOTS_PER_INCH = 120


def plot_methods(results: Results, path: Path) -> Path | None:
    """Bars with error bars: both Fréchet distances and the accuracy of every method that ran."""
    rows = [m for m in [*results.real, *results.methods] if m.was_run]
    if not rows:
        return None
    figure = _figure(13, 0.36 * len(rows) + 1.4)
    axes = figure.subplots(1, 3, sharey=True)
    panels = (
        ("frechet", "Fréchet distance (log)\nclassifier features, lower is better"),
        ("patch", "patch distance (log)\npixel detail, lower is better"),
        ("accuracy", "caption accuracy\nhigher is better"),
    )
    summaries = [row.summary() for row in rows]
    for axis, (name, title) in zip(axes, panels, strict=True):
        means = [summary[name].mean for summary in summaries]
        errors = np.nan_to_num([summary[name].std for summary in summaries])
        colours = [_COLOURS[_family(row)] for row in rows]
        axis.barh(range(len(rows)), means, xerr=errors, color=colours, height=0.7, capsize=2)
        axis.set_title(title, fontsize=10)
        for y, (mean, error) in enumerate(zip(means, errors, strict=True)):
            axis.annotate(
                f"{mean:.3g}",
                (mean + error, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        if name == "accuracy":
            axis.set_xlim(0, 1.15)
        else:
            _logarithmic(axis, "x")
            axis.set_xlim(min(means) / 1.5, max(means) * 3)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9)
    axes[0].invert_yaxis()
    return _save(figure, path)


def plot_discriminator_loss(curves: dict[str, LossCurve], path: Path) -> Path | None:
    """APT Figure 5: D's loss with the regulariser (green) and without (black)."""
    shown = [(curves[key], colour) for key, colour in _FIGURE_5 if key in curves]
    if not shown:
        return None
    figure = _figure(7.5, 4)
    axis = figure.subplots()
    for curve, colour in shown:
        axis.plot(curve.updates, curve.losses, color=colour, alpha=0.25, linewidth=0.8)
        smooth = _running_mean(curve.losses, max(1, len(curve.losses) // 40))
        axis.plot(curve.updates, smooth, color=colour, linewidth=1.8, label=curve.label)
    start = 2 * float(np.log(2))
    axis.axhline(start, color="#999999", linewidth=0.8, linestyle="--")
    axis.annotate(
        "2 log 2: D cannot tell",
        (1, start),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#666666",
    )
    axis.axhline(ZERO_LOSS, color="#cc4444", linewidth=0.8, linestyle=":")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("update")
    axis.set_ylabel("discriminator loss, without the penalty")
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize=9)
    return _save(figure, path)


def plot_progress(results: Results, path: Path) -> Path | None:
    """APT Figure 9: quality of EMA and raw weights after some updates, with the spread."""
    if not results.progress:
        return None
    figure = _figure(13, 3.9)
    axes = figure.subplots(1, 3)
    panels = (
        ("frechet", "Fréchet distance (log)"),
        ("patch", "patch distance (log)"),
        ("accuracy", "caption accuracy"),
    )
    for axis, (name, title) in zip(axes, panels, strict=True):
        for weights, colour in (("ema", _COLOURS["apt"]), ("raw", "#b0483a")):
            points = sorted(
                (p for p in results.progress if p.weights == weights), key=lambda p: p.update
            )
            _plot_band(axis, points, name, weights, colour)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("generator updates")
        if name != "accuracy":
            _logarithmic(axis, "y")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=9)
    return _save(figure, path)


def plot_spectrum(results: Results, path: Path) -> Path | None:
    """Radial power of the main methods relative to real clips: blur falls below the line."""
    shown = [m for m in (results.method(x.name) for x in (DIFFUSION_GUIDED, CONSISTENCY, APT)) if m]
    if not shown:
        return None
    figure = _figure(7.5, 4)
    axis = figure.subplots()
    frequencies = np.arange(1, len(results.reference_power) + 1)
    reference = np.asarray(results.reference_power)
    for row in [*results.real[:1], *shown]:
        power = np.asarray([m.radial_power for m in row.measurements]) - reference
        mean, std = power.mean(axis=0), power.std(axis=0)
        colour = _COLOURS[_family(row)]
        axis.plot(frequencies, mean, color=colour, label=row.label, linewidth=1.8)
        axis.fill_between(frequencies, mean - std, mean + std, color=colour, alpha=0.2)
    axis.axhline(0, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_xlabel("spatial frequency, cycles per frame")
    axis.set_ylabel("power relative to real clips, dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return _save(figure, path)


_FIGURE_5 = (("apt", _COLOURS["apt"]), (NO_REGULARISER, "#000000"))


def _plot_band(
    axis: Axes, points: Sequence[Progress], name: str, weights: str, colour: str
) -> None:
    updates = [p.update for p in points]
    found = [summarise(p.measurements)[name] for p in points]
    mean = np.asarray([s.mean for s in found])
    std = np.nan_to_num([s.std for s in found])
    label = {"ema": "EMA", "raw": "raw weights"}[weights]
    axis.plot(updates, mean, color=colour, marker="o", markersize=3.5, label=label)
    # On a log scale the band must not reach zero.
    axis.fill_between(
        updates, np.maximum(mean - std, mean / 10), mean + std, color=colour, alpha=0.2
    )


def _logarithmic(axis: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers: 1, 2, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    scale = axis.xaxis if which == "x" else axis.yaxis
    scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_formatter(NullFormatter())


def _running_mean(values: Sequence[float], half: int) -> list[float]:
    return [spread(values[max(0, i - half) : i + half + 1]).mean for i in range(len(values))]


def _family(row: MethodResult) -> str:
    if row.group == "real":
        return "real"
    if row.group == "ablation":
        return "ablation"
    return row.name.split("_")[0]


def _figure(width: float, height: float) -> Figure:
    # Slow to import, and only needed once there is something to draw.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return path
