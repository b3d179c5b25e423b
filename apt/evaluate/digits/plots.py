"""The plots of the digits report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from apt.evaluate.digits.methods import (
    APT,
    CODEC,
    CONSISTENCY,
    DIFFUSION_GUIDED,
    LONG,
    NO_REGULARISER,
)
from apt.evaluate.digits.results import MethodResult, Results, Snapshot
from apt.evaluate.digits.runs import CURVES
from apt.evaluate.plotting import Panel, logarithmic, new_figure, plot_bars, save_figure
from apt.evaluate.spread import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "diffusion": "#4c78a8",
    "consistency": "#e39c37",
    "apt": "#2e8b57",
    "ablation": "#9cc7ac",
    "codec": "#8a6fb0",
    "real": "#777777",
}


def plot_methods(results: Results, path: Path) -> Path:
    """Plot both Fréchet distances and the accuracy of every method as bars with error bars."""
    rows = [*results.real, *results.methods]
    summaries = [row.summary() for row in rows]
    panels: tuple[tuple[str, str, Literal["log", "share"]], ...] = (
        ("frechet", "Fréchet distance (log)\nclassifier features, lower is better", "log"),
        ("patch", "patch distance (log)\npixel detail, lower is better", "log"),
        ("accuracy", "caption accuracy\nhigher is better", "share"),
    )
    return plot_bars(
        path,
        [row.label for row in rows],
        [
            Panel(title=title, values=[summary[name] for summary in summaries], scale=scale)
            for name, title, scale in panels
        ],
        colours=[_COLOURS[_family(row)] for row in rows],
    )


def plot_regulariser(results: Results, path: Path) -> Path | None:
    """Plot APT Figure 5: with the regulariser (green) and without (black), against updates."""
    runs = [(f"ablations/{run}", label, colour) for run, label, colour in _FIGURE_5]
    if any(run not in results.curves for run, _, _ in runs):
        return None
    figure = new_figure(15, 3.4)
    axes = figure.subplots(1, 5)
    for run, label, colour in runs:
        for axis, name in zip(axes[:2], CURVES, strict=True):
            curve = results.curves[run].get(name)
            if curve is None:
                continue
            axis.plot(curve.updates, curve.values, color=colour, alpha=0.2, linewidth=0.8)
            smooth = _running_mean(curve.values, max(1, len(curve.values) // 40))
            axis.plot(curve.updates, smooth, color=colour, linewidth=1.8, label=label)
        for axis, name in zip(axes[2:], ("within", "frechet", "patch"), strict=True):
            _plot_band(axis, results.of_run(run), name, label, colour)
    axes[0].axhline(2 * float(np.log(2)), color="#999999", linewidth=0.8, linestyle="--")
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    titles = (
        "D's loss (dashed: cannot tell)",
        "D's gradient at its input (log)",
        "diversity within a caption",
        "Fréchet distance (log)",
        "patch distance (log)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3, which="both")
    for axis in axes[3:]:
        logarithmic(axis, "y")
    axes[0].legend(loc="best", fontsize=8)
    return save_figure(figure, path)


def plot_progress(results: Results, path: Path) -> Path | None:
    """Plot APT Figure 9: quality of EMA and raw weights against updates, with the spread."""
    return _plot_snapshots(results, APT.run, path)


def plot_distillation(results: Results, path: Path) -> Path | None:
    """Plot one-step quality against updates of distillation."""
    return _plot_snapshots(results, CONSISTENCY.run, path)


def _plot_snapshots(results: Results, run: str, path: Path) -> Path | None:
    if not results.of_run(run):
        return None
    figure = new_figure(13, 3.9)
    axes = figure.subplots(1, 3)
    panels = (
        ("frechet", "Fréchet distance (log)"),
        ("patch", "patch distance (log)"),
        ("accuracy", "caption accuracy"),
    )
    for axis, (name, title) in zip(axes, panels, strict=True):
        for weights, label, colour in (
            ("ema", "EMA", _COLOURS["apt"]),
            ("raw", "raw weights", "#b0483a"),
        ):
            _plot_band(axis, results.of_run(run, weights), name, label, colour)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("generator updates")
        if name != "accuracy":
            logarithmic(axis, "y")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=9)
    return save_figure(figure, path)


def plot_spectrum(results: Results, path: Path) -> Path | None:
    """Plot the radial power of the main methods relative to real clips; blur is below zero."""
    shown = [
        m
        for m in (results.method(x.name) for x in (CODEC, DIFFUSION_GUIDED, CONSISTENCY, APT))
        if m
    ]
    if not shown:
        return None
    figure = new_figure(7.5, 4)
    axis = figure.subplots()
    frequencies = np.arange(1, len(results.reference_power) + 1)
    reference = np.asarray(results.reference_power)
    for row in [*results.real[:1], *shown]:
        power = np.asarray([m.radial_power for m in row.measurements.values()]) - reference
        mean, std = power.mean(axis=0), power.std(axis=0)
        colour = _COLOURS[_family(row)]
        axis.plot(frequencies, mean, color=colour, label=row.label, linewidth=1.8)
        axis.fill_between(frequencies, mean - std, mean + std, color=colour, alpha=0.2)
    axis.axhline(0, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_xlabel("spatial frequency, cycles per frame")
    axis.set_ylabel("power relative to real clips, dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return save_figure(figure, path)


_FIGURE_5 = (
    (LONG, "with regulariser", _COLOURS["apt"]),
    (NO_REGULARISER, "without regulariser", "#000000"),
)


def _plot_band(axis: Axes, points: Sequence[Snapshot], name: str, label: str, colour: str) -> None:
    if not points:
        return
    updates = [p.update for p in points]
    found = [p.summary()[name] for p in points]
    mean = np.asarray([s.mean for s in found])
    std = np.asarray([s.known for s in found])
    axis.plot(updates, mean, color=colour, marker="o", markersize=3.5, label=label)
    # On a log scale the band must not reach zero.
    axis.fill_between(
        updates, np.maximum(mean - std, mean / 10), mean + std, color=colour, alpha=0.2
    )


def _running_mean(values: Sequence[float], half: int) -> list[float]:
    return [spread(values[max(0, i - half) : i + half + 1]).mean for i in range(len(values))]


def _family(row: MethodResult) -> str:
    if row.group == "real":
        return "real"
    if row.group == "ablation":
        return "ablation"
    return row.name.split("_")[0]
