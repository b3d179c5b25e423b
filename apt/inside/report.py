"""Write the results of `probe_layers` and `traverse`: images, a video, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from apt.files import write_text
from apt.inside.probe import ProbeResult
from apt.inside.traverse import Traversal
from apt.media import moving_sheet, write_contact_sheet, write_mp4
from apt.pixels import to_frames

_SHOWN = 13
"""Samples of a path on its sheet; more would be too small to see."""


def write_probe(folder: Path, result: ProbeResult, prompts: Sequence[str], about: str) -> None:
    """Write ``layers.png``, ``errors.png`` and ``probe.json``.

    Args:
        folder: an existing folder.
        result: what `probe_layers` returned.
        prompts: the prompts of `result.pixels`.
        about: name of the model, for titles.
    """
    names = [f"layer {layer.layer}" for layer in result.layers]
    if result.pixels:
        middle = result.pixels[0].shape[2] // 2
        write_contact_sheet(
            folder / "layers.png",
            [
                list(to_frames(pixels[:, :, middle : middle + 1]).numpy())
                for pixels in result.pixels
            ],
            rows=prompts,
            columns=[*names, "the model"],
            title=f"{about}: what a linear projection reads from each layer",
        )
    _plot_errors(folder / "errors.png", result, about)
    figures = {
        "model": about,
        "prompts": list(prompts),
        "error": {str(layer.layer): layer.error for layer in result.layers},
    }
    write_text(folder / "probe.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def write_traversals(
    folder: Path,
    ways: Mapping[str, Traversal],
    *,
    prompt: str,
    seeds: Sequence[int],
    fps: float,
    scale: int | None = None,
) -> None:
    """Write ``traverse.mp4``, ``traverse.png`` and ``traverse.json``.

    Only the middle frame of each video is shown.

    Args:
        folder: an existing folder.
        ways: paths of equal length, by name of the model.
        prompt: the prompt of all samples.
        seeds: the seeds between which the paths lead.
        fps: samples per second of ``traverse.mp4``.
        scale: whole enlargement factor; None makes frames about 96 pixels high.
    """
    frames = {}
    for name, way in ways.items():
        middle = way.pixels.shape[2] // 2
        frames[name] = to_frames(way.pixels[:, :, middle : middle + 1])[:, 0].numpy()
    number = len(next(iter(frames.values())))
    count = min(_SHOWN, number)
    shown = [round(i * (number - 1) / max(1, count - 1)) for i in range(count)]
    heads = {
        name: f"{name}\nlargest step {way.peak:.1f} times the mean" for name, way in ways.items()
    }
    write_contact_sheet(
        folder / "traverse.png",
        [[part[shown]] for part in frames.values()],
        rows=[head.replace("\n", ", ") for head in heads.values()],
        columns=[f"{prompt}\nnoise of seeds {', '.join(map(str, seeds))}"],
        scale=scale,
    )
    moving = moving_sheet(
        [list(frames.values())], rows=[prompt], columns=list(heads.values()), scale=scale
    )
    write_mp4(folder / "traverse.mp4", moving, fps=fps, scale=1)
    figures = {
        "prompt": prompt,
        "seeds": list(seeds),
        "models": {
            name: {
                "mean_step": way.mean_step,
                "largest_over_mean": way.peak,
                "steps": [float(step) for step in way.steps],
            }
            for name, way in ways.items()
        },
    }
    write_text(folder / "traverse.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def _plot_errors(path: Path, result: ProbeResult, about: str) -> None:
    # Slow to import, and only needed once there is something to draw.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(
        [layer.layer for layer in result.layers],
        [layer.error for layer in result.layers],
        marker="o",
        color="#2e8b57",
    )
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    axis.set_ylabel("error of the projection\n(of the latents' variance)")
    axis.set_title(about, fontsize=10)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
