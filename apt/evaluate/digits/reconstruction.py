"""Real clips through a codec and back: the floor of everything that is made in its latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.checkpoints.load import load_bundle
from apt.evaluate.digits.clips import CaptionSet, real_for_captions
from apt.pixels import to_frames
from apt.samples import SampleKey


class Reconstruction:
    """A model whose sample of a caption is a real clip of held-out handwriting, reconstructed.

    See `apt.evaluate.models.SampleModel`.

    Args:
        folder: of a model, whose codec it is.
        sets: captions and noise seeds that it may be asked for.
        batch_size: clips per call of the codec.

    Raises CheckpointError for a model that cannot be loaded.
    """

    def __init__(self, folder: Path, sets: Sequence[CaptionSet], *, batch_size: int) -> None:
        bundle = load_bundle(folder)
        self._codec = bundle.codec
        self._places = {
            key: (captions, position)
            for captions in sets
            for position, key in enumerate(captions.keys)
        }
        self.batch_size = batch_size
        self.frames, self.fps = bundle.info.sample.frames, bundle.info.sample.fps
        self.settings: Mapping[str, Any] = {
            "model": str(folder),
            "model_content": bundle.origin and (bundle.origin.revision or bundle.origin.weights),
            "num_steps": 0,
            "batch_size": batch_size,
        }

    def stream(self, keys: Sequence[SampleKey]) -> Iterator[Tensor]:
        """The reconstructions, uint8 (T, H, W, 3), one after the other."""
        for start in range(0, len(keys), self.batch_size):
            places = [self._places[key] for key in keys[start : start + self.batch_size]]
            clips = [real_for_captions(captions, "test", [at]) for captions, at in places]
            with torch.no_grad():
                yield from to_frames(self._codec.decode(self._codec.encode(torch.cat(clips))))
