"""Whether a codec's statistics are those of the data: latents are to have about unit variance."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from apt.models.codecs import PatchifyConfig
from apt.train.config import TrainConfig

__all__ = ["LatentStatistics"]

NUM_CLIPS = 16
# Beyond these, timesteps mean another amount of noise than the recipes were made for.
_PIXEL_SHIFT, _PIXEL_SCALE, _LATENT_SCALE = 0.5, 1.5, 2.0


class LatentStatistics:
    """Looks at the first clips of a run.

    The lossless codec says in its config which mean and standard deviation of pixels it was fitted
    to, and these are compared; of other codecs the root mean square of the latents is looked at.

    Args:
        codec_config: of the codec, or of the one that made a cache.
        config: of the run.
    """

    def __init__(self, codec_config: Any, config: TrainConfig) -> None:
        self._codec = codec_config
        self._config = config
        self._clips = 0
        self._judged = False
        self._values = 0
        self._sum = 0.0
        self._squares = 0.0
        self._of_pixels: bool | None = None

    def observe(self, pixels: Tensor | None, latents: Tensor) -> str | None:
        """Take some clips in; what is wrong, once enough of them were seen.

        Args:
            pixels: (b, 3, T, H, W), None in a run on a latent cache.
            latents: (b, C, T', H', W').
        """
        if self._judged:
            return None
        self._of_pixels = pixels is not None and isinstance(self._codec, PatchifyConfig)
        values = (pixels if self._of_pixels and pixels is not None else latents).double()
        self._clips += len(latents)
        self._values += values.numel()
        self._sum += values.sum().item()
        self._squares += values.square().sum().item()
        return self.verdict() if self._clips >= NUM_CLIPS else None

    def verdict(self) -> str | None:
        """What is wrong with the clips so far, if that was not told; for the end of a short run."""
        if self._judged or not self._clips:
            return None
        self._judged = True
        mean, square = self._sum / self._values, self._squares / self._values
        if not self._of_pixels:
            return self._of_latents(math.sqrt(square))
        codec, std = self._codec, math.sqrt(max(square - mean**2, 0.0))
        fits = abs(mean - codec.mean) <= _PIXEL_SHIFT * codec.std
        if fits and codec.std / _PIXEL_SCALE <= std <= codec.std * _PIXEL_SCALE:
            return None
        return (
            f"the codec's statistics are of other data: it takes pixels to have mean "
            f"{codec.mean:g} and standard deviation {codec.std:g}, and the first {self._clips} "
            f"clips have {mean:.2f} and {std:.2f}. {self._remedy(mean, std)}"
        )

    def _of_latents(self, size: float) -> str | None:
        if 1 / _LATENT_SCALE <= size <= _LATENT_SCALE:
            return None
        return (
            f"the codec's statistics are of other data: latents of the first {self._clips} clips "
            f"have a root mean square of {size:.2f} instead of 1, so timesteps mean another amount "
            "of noise than the recipe was made for"
        )

    def _remedy(self, mean: float, std: float) -> str:
        if self._config.stage.start_field is not None:
            return (
                "This stage keeps the codec of the model that it starts from: expect less, or "
                "pre-train on these data"
            )
        return f"Start again with mean {mean:.2f} and std {std:.2f} in --model.codec-options"
