"""Samples of a file of prompts side by side, without a measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apt.evaluate.protocol import PROTOCOLS, Protocol, Request
from apt.generate_options import GenerateOptions
from apt.prompts import read_prompts


@PROTOCOLS.register("prompts")
@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of your own, samples side by side: to look at, and for a preference study."""

    prompts: Path
    """Text with one prompt per line."""
    samples_per_prompt: int = 1
    """Samples of each prompt and seed."""
    seeds: tuple[int, ...] = (0,)
    """Evaluation seeds; each has noise of its own."""
    frames: int | None = None
    """Frames of each sample; None, also below, is each model's own number."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""

    def build(self, request: Request) -> Protocol:
        """The protocol. Raises InputError for prompts that cannot be read."""
        return Protocol(
            name="prompts",
            about="Nothing is measured. The same prompts and noise for every model.",
            prompts=tuple(dict.fromkeys(read_prompts(self.prompts))),
            samples_per_prompt=self.samples_per_prompt,
            seeds=self.seeds,
            options=GenerateOptions(frames=self.frames, height=self.height, width=self.width),
            figures={},
        )
