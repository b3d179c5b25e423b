"""Plot the curves of a run from its JSONL log."""

from __future__ import annotations

import math
from pathlib import Path

from apt.errors import DataError
from apt.train.logs import read_log

__all__ = ["plot_losses"]


def plot_losses(run_dir: Path) -> Path:
    """Plot every metric of `run_dir/log.jsonl` over updates into `losses.png`.

    Metrics whose names end alike (`discriminator/loss`, `generator/loss`) share a panel. The file
    appears whole or not at all, so it can be viewed during the run.

    Returns:
        Path of the PNG.

    Raises:
        DataError: there is no log, or it is empty.
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    entries = read_log(run_dir)
    panels: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for entry in entries for name in entry if name != "step"):
        panels.setdefault(name.split("/")[-1], []).append(name)
    if not panels:
        raise DataError(f"the log in {run_dir} has no metrics to plot; train for an update first")
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width, height = 5 * columns, 3.2 * rows
    figure = Figure(figsize=(width, height))
    # Set margins in inches, because a layout engine would draw everything twice to find them.
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.35 / height,
        wspace=0.9 / 4.1, hspace=0.85 / 2.35,
    )  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
            x, y = [step for step, _ in points], [value for _, value in points]
            label = name.rpartition("/")[0] or name
            axis.plot(x, y, label=label, linewidth=1.2, marker="." if len(points) == 1 else None)
        axis.set_title(title, y=1)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    path = run_dir / "losses.png"
    partial = run_dir / f".{path.name}.partial"
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)
    return path
