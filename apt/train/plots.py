"""Curves of a run, drawn from its JSONL log."""

from __future__ import annotations

import math
from pathlib import Path

from apt.errors import DataError
from apt.train.logs import read_log

__all__ = ["plot_losses"]


def plot_losses(run_dir: Path) -> Path:
    """Draw every metric of `run_dir/log.jsonl` against the update into `losses.png`.

    Metrics with a common prefix (`loss/d`, `loss/g`) share a panel.

    Returns:
        Path of the PNG.

    Raises:
        DataError: no log, or an empty one.
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    entries = read_log(run_dir)
    panels: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for entry in entries for name in entry if name != "step"):
        panels.setdefault(name.split("/")[0], []).append(name)
    if not panels:
        raise DataError(f"the log in {run_dir} holds no metrics to draw; train for an update first")
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.2)
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    path = run_dir / "losses.png"
    figure.savefig(path, dpi=110)
    return path
