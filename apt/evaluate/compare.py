"""Compare two runs of one model sample by sample, to see whether a change altered its output.

These are full-reference measures for 8-bit weights, VAEs, kernels and exports. They compare samples
of the same prompt and seed, so they say nothing about two different models.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.data.decode import probe
from apt.errors import InputError, MissingPackageError, listed
from apt.evaluate.video_measures import read_video
from apt.files import without_nan, write_text
from apt.metrics.fidelity import check_alike, psnr, ssim
from apt.samples import read_samples


@dataclass(frozen=True)
class Fidelity:
    """A measure of how close a video is to the one that it should equal.

    Attributes:
        title: includes the unit.
        higher_is_better: otherwise, lower is better.
        measure: maps reference and test, uint8 (T, H, W, 3), and frames per second to a figure.
    """

    title: str
    higher_is_better: bool
    measure: Callable[[Tensor, Tensor, float], float]

    def worst(self, values: Sequence[float]) -> float:
        """Return the figure that is furthest from equality."""
        return min(values) if self.higher_is_better else max(values)

    def passes(self, value: float, limit: float) -> bool:
        """Return whether a figure meets a limit."""
        return value >= limit if self.higher_is_better else value <= limit


def _flip(reference: Tensor, test: Tensor, _: float) -> float:
    try:
        import flip_evaluator
    except ImportError as error:
        raise _missing("flip-evaluator", error) from error
    check_alike(reference, test)
    errors = [
        flip_evaluator.evaluate(a.numpy() / 255.0, b.numpy() / 255.0, "LDR", applyMagma=False)[1]
        for a, b in zip(reference.float(), test.float(), strict=True)
    ]
    return sum(errors) / len(errors)


def _cvvdp(reference: Tensor, test: Tensor, fps: float) -> float:
    check_alike(reference, test)
    metric = _cvvdp_metric()
    still = len(reference) == 1
    order = "HWC" if still else "FHWC"
    frames = [clip[0].numpy() if still else clip.numpy() for clip in (test, reference)]
    quality, _ = metric.predict(*frames, dim_order=order, frames_per_second=fps)
    return float(quality)


@functools.cache
def _cvvdp_metric() -> Any:
    try:
        import pycvvdp
    # A torchvision that was built for another torch raises RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise _missing("cvvdp", error) from error
    return pycvvdp.cvvdp(display_name="standard_fhd", quiet=True, device=torch.device("cpu"))


def _missing(package: str, error: Exception) -> MissingPackageError:
    return MissingPackageError(
        f"this needs {package}, which cannot be imported ({error}); "
        "run `pip install diffusion-apt[eval]`"
    )


FIDELITIES: Mapping[str, Fidelity] = {
    "psnr": Fidelity("PSNR (dB)", True, lambda a, b, _: psnr(a, b)),
    "ssim": Fidelity("SSIM", True, lambda a, b, _: ssim(a, b)),
    # NVIDIA's FLIP of SDR frames at its default of 67 pixels per degree, mean over frames and
    # pixels; 0 means equal, 1 is the largest difference (Andersson et al., 2020).
    "flip": Fidelity("FLIP", False, _flip),
    # ColorVideoVDP's JOD on a full-HD screen at its usual distance; 10 means equal, and three in
    # four people see a difference of 1 (Mantiuk et al., 2024).
    "cvvdp": Fidelity("ColorVideoVDP (JOD)", True, _cvvdp),
}
"""Measures by name. FLIP and ColorVideoVDP need the extra `eval`."""


@dataclass(frozen=True)
class Comparison:
    """Figures of every pair.

    Attributes:
        names: of the pairs.
        figures: by measure, one for each pair.
        limits: by measure, what the worst pair must reach.
    """

    names: Sequence[str]
    figures: Mapping[str, Sequence[float]]
    limits: Mapping[str, float]

    def worst(self, measure: str) -> tuple[str, float]:
        """Return the worst pair's name and figure."""
        values = self.figures[measure]
        worst = FIDELITIES[measure].worst(values)
        return self.names[values.index(worst)], worst

    @property
    def failed(self) -> list[str]:
        """Measures whose worst pair misses its limit."""
        return [
            name
            for name, limit in self.limits.items()
            if not FIDELITIES[name].passes(self.worst(name)[1], limit)
        ]

    def render(self) -> str:
        """Return a table: mean and worst figure of each measure, and whether its limit is met."""
        lines = [f"{len(self.names)} pairs"]
        for name, values in self.figures.items():
            pair, worst = self.worst(name)
            line = f"{FIDELITIES[name].title}: mean {_mean(values):.4g}, worst {worst:.4g} ({pair})"
            if name in self.limits:
                missed = name in self.failed
                line += f", limit {self.limits[name]:g}: {'MISSED' if missed else 'met'}"
            lines.append(line)
        return "\n".join(lines)

    def write_json(self, path: Path) -> None:
        """Write all figures, with null for infinity, which JSON does not have.

        Raises InputError if the file cannot be written.
        """
        document: dict[str, Any] = {"pairs": list(self.names), "measures": {}}
        for name, values in self.figures.items():
            document["measures"][name] = {
                "figures": list(values),
                "limit": self.limits.get(name),
                "met": name not in self.failed,
            }
        try:
            write_text(path, json.dumps(without_nan(document), indent=1) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write {str(path)!r}: {error.strerror or error}; choose another place"
            ) from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pair_files(reference: Path, test: Path) -> dict[str, tuple[Path, Path]]:
    """Return the pairs to compare, by name: two files, or two folders' samples by prompt and seed.

    Raises:
        InputError: a file and a folder, or folders with different prompts or seeds.
        DataError: a folder without a manifest of samples.
    """
    if reference.is_file() and test.is_file():
        return {test.name: (reference, test)}
    if reference.is_file() or test.is_file():
        raise InputError(f"{str(reference)!r} and {str(test)!r}: give two files, or two folders")
    first, second = read_samples(reference).samples, read_samples(test).samples
    alone = [f"{prompt!r} seed {seed}" for prompt, seed in first.keys() ^ second.keys()]
    if alone:
        raise InputError(
            f"{len(alone)} samples are in only one of {str(reference)!r} and {str(test)!r}: "
            f"{listed(sorted(alone))}; generate both with the same prompts and seeds"
        )
    return {
        f"{prompt!r} seed {seed}": (sample.path, second[prompt, seed].path)
        for (prompt, seed), sample in first.items()
    }


def compare(
    reference: Path,
    test: Path,
    *,
    measures: Sequence[str] = ("psnr", "ssim"),
    limits: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare two files, or all samples of two folders.

    Args:
        reference: the expected output.
        test: the output to check.
        measures: names in `FIDELITIES`.
        limits: by measure, what the worst pair must reach; these measures are computed too.
        progress: called with the numbers of finished pairs and of all pairs.

    Raises:
        InputError: unknown measures, a limit that is not finite, or pairs that cannot be compared.
        DataError: files or manifests that cannot be read.
        MissingPackageError: a measure needs the extra `eval`, which is not installed.
    """
    limits = dict(limits or {})
    names = list(dict.fromkeys([*measures, *limits]))
    unknown = [name for name in names if name not in FIDELITIES]
    if unknown or not names:
        raise InputError(f"unknown measures {unknown}; choose from {', '.join(FIDELITIES)}")
    if odd := [name for name, limit in limits.items() if not math.isfinite(limit)]:
        raise InputError(f"limits must be finite numbers, got {limits[odd[0]]} for {odd[0]}")
    pairs = pair_files(reference, test)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for done, (pair, (right, looked_at)) in enumerate(pairs.items(), 1):
        info = probe(right)
        first, second = read_video(right), read_video(looked_at)
        for name in names:
            try:
                figure = FIDELITIES[name].measure(first, second, float(info.fps))
            except MissingPackageError:
                raise
            except InputError as error:
                raise InputError(f"{pair}: {error}") from error
            figures[name].append(figure)
        progress(done, len(pairs))
    return Comparison(list(pairs), figures, limits)
