"""Reconstructions of real clips: the best that any model in a codec's latents can reach."""

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
    """A model whose sample for a caption is a reconstructed real clip of held-out handwriting.

    See `apt.evaluate.models.SampleModel`.

    Args:
        folder: of the model whose codec is used.
        sets: captions and noise seeds that can be requested.
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
        """Yield the reconstructions in order, uint8 (T, H, W, 3)."""
        for start in range(0, len(keys), self.batch_size):
            places = [self._places[key] for key in keys[start : start + self.batch_size]]
            clips = [real_for_captions(captions, "test", [at]) for captions, at in places]
            with torch.no_grad():
                yield from to_frames(self._codec.decode(self._codec.encode(torch.cat(clips))))
