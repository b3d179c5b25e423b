"""Pixels in [-1, 1] and their conversions: latents, 8-bit frames, diffusers' output types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from apt.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

OutputType = Literal["uint8", "pt", "np", "pil"]
"""The type that a call returns, always on the CPU:

- "uint8": a tensor (B, T, H, W, 3);
- "pt": an fp32 tensor (B, T, 3, H, W) in [0, 1], as in diffusers;
- "np": an fp32 array (B, T, H, W, 3) in [0, 1], as in diffusers;
- "pil": a list of T images per video, as in diffusers.
"""


class LatentCodec(nn.Module):
    """Codec between pixels (B, 3, T, H, W) in [-1, 1] and latents (B, C, T', H', W').

    The latents have about unit variance.

    Attributes:
        config: the frozen dataclass it was built from.
        channels: C.
        temporal_compression: 4 means that 4k + 1 frames become k + 1 latent frames.
        spatial_compression: pixels per latent along height and width.
        encodes_in_autocast: whether a training run may encode in the run's precision. Public codecs
            compute in the precision of their config.
    """

    config: Any
    channels: int
    temporal_compression: int
    spatial_compression: int
    encodes_in_autocast: bool = False

    def __repr__(self) -> str:
        """Return one line; `torch.nn.Module.__repr__(codec)` shows the modules."""
        from apt.words import described_weights

        time, space = self.temporal_compression, self.spatial_compression
        return (
            f"{type(self).__name__}(channels={self.channels}, temporal_compression={time}, "
            f"spatial_compression={space}, {described_weights(self)})"
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels to latents. Raises InputError for sizes that do not fit."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels."""
        raise NotImplementedError

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T', H', W') of a clip whose first frame becomes a latent frame of its own.

        Raises InputError for sizes that do not fit, naming the nearest ones that do.
        """
        temporal, spatial = self.temporal_compression, self.spatial_compression
        if frames < 1 or (frames - 1) % temporal:
            low = max(frames - 1, 0) // temporal * temporal + 1
            raise InputError(
                f"{frames} frames do not fit; use {low} or {low + temporal} ({temporal}k + 1)"
            )
        for name, size in (("height", height), ("width", width)):
            if size < spatial or size % spatial:
                low = max(size // spatial, 1) * spatial
                raise InputError(
                    f"{name} {size} does not fit; use a multiple of {spatial}, such as {low} or "
                    f"{low + spatial}"
                )
        return (frames - 1) // temporal + 1, height // spatial, width // spatial


def to_uint8(pixels: Tensor) -> Tensor:
    """Convert pixels, clipped to [-1, 1], to 0..255, rounding to nearest.

    Raises InputError for NaN, which would become black.
    """
    bad = int(pixels.isnan().sum())
    if bad:
        raise InputError(
            f"{bad} of {pixels.numel()} pixel values are NaN: the model that made them diverged, "
            "or its dtype is too narrow; try bfloat16 or float32"
        )
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def check_output_type(output_type: str) -> None:
    """Raise InputError for an unknown output type."""
    if output_type not in get_args(OutputType):
        raise InputError(
            f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}; "
            "for pixels in [-1, 1] on the device, use sample_pixels()"
        )


def to_frames(pixels: Tensor) -> Tensor:
    """Convert pixels (B, 3, T, H, W) in [-1, 1] to uint8 (B, T, H, W, 3) on the CPU."""
    return to_uint8(pixels).permute(0, 2, 3, 4, 1).contiguous().cpu()


def to_unit(pixels: Tensor) -> Tensor:
    """Convert pixels (B, 3, T, H, W) in [-1, 1] to fp32 (B, T, 3, H, W) in [0, 1] on the CPU."""
    return ((pixels.float() + 1) / 2).clamp(0, 1).transpose(1, 2).contiguous().cpu()


def to_array(unit: Tensor) -> npt.NDArray[np.float32]:
    """Convert the result of `to_unit` to an array (B, T, H, W, 3)."""
    array: npt.NDArray[np.float32] = unit.permute(0, 1, 3, 4, 2).contiguous().numpy()
    return array


def to_images(frames: Tensor) -> list[list[Image.Image]]:
    """Convert uint8 (B, T, H, W, 3) to T images per video."""
    from PIL import Image

    return [[Image.fromarray(frame) for frame in video.numpy()] for video in frames]
