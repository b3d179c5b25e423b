"""Samples of a file of prompts, side by side, and the fidelity of one model to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apt.data.decode import probe
from apt.errors import InputError
from apt.evaluate.compare import FIDELITIES, Fidelity
from apt.evaluate.protocol import PROTOCOLS, Figure, Figures, Protocol, Request
from apt.evaluate.video_measures import read_video
from apt.generate_options import GenerateOptions
from apt.prompts import read_prompts
from apt.samples import Sample


@PROTOCOLS.register("prompts")
@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Your own prompts, side by side: to look at, for a study, or to check a change."""

    prompts: Path
    """Text with one prompt per line."""
    samples_per_prompt: int = 1
    """Samples of each prompt and seed."""
    seeds: tuple[int, ...] = (0,)
    """Evaluation seeds; each has its own noise."""
    frames: int | None = None
    """Frames of each sample; None, here and below, uses each model's own."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    fidelity: tuple[Literal["psnr", "ssim", "flip", "cvvdp"], ...] = ()
    """How close each further model's samples, stored without loss, are to the first model's with
    the same prompt and seed: for 8-bit weights, exports and kernels, not for different models.
    `compare` checks two folders of samples against limits."""

    def build(self, request: Request) -> Protocol:
        """Build the protocol. Raises InputError for prompts that cannot be read."""
        about = "The same prompts and noise seeds for every model."
        if self.fidelity:
            about += " Each further model's samples are compared with those of the first."
        return Protocol(
            name="prompts",
            about=about,
            prompts=tuple(dict.fromkeys(read_prompts(self.prompts))),
            samples_per_prompt=self.samples_per_prompt,
            seeds=self.seeds,
            lossless=bool(self.fidelity),
            options=GenerateOptions(frames=self.frames, height=self.height, width=self.width),
            figures={name: _figure(FIDELITIES[name]) for name in self.fidelity},
            pair_measures=(self._measure,) if self.fidelity else (),
            settings={"fidelity": list(self.fidelity)},
        )

    def _measure(self, samples: Sequence[Sample], others: Sequence[Sample]) -> Figures:
        """Return means over the pairs. Raises InputError for samples of different sizes."""
        total = dict.fromkeys(self.fidelity, 0.0)
        for sample, other in zip(samples, others, strict=True):
            clips = read_video(other.path), read_video(sample.path)
            fps = float(probe(other.path).fps)
            for name in total:
                try:
                    total[name] += FIDELITIES[name].measure(*clips, fps)
                except InputError as error:
                    raise InputError(f"{other.path} and {sample.path}: {error}") from error
        return {name: value / len(samples) for name, value in total.items()}


def _figure(fidelity: Fidelity) -> Figure:
    return Figure(fidelity.title, "higher" if fidelity.higher_is_better else "lower")
