"""What becomes of pixels in [-1, 1]: latents by a codec, 8 bits, and diffusers' `output_type`s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from apt.errors import InputError
from apt.words import described_weights

if TYPE_CHECKING:
    from PIL import Image

OutputType = Literal["uint8", "pt", "np", "pil"]
"""What a call returns, always on the CPU:

- "uint8": a tensor (B, T, H, W, 3);
- "pt": an fp32 tensor (B, T, 3, H, W) in [0, 1], as diffusers;
- "np": an fp32 array (B, T, H, W, 3) in [0, 1], as diffusers;
- "pil": a list of T images for each video, as diffusers.
"""


class LatentCodec(nn.Module):
    """Pixels (B, 3, T, H, W) in [-1, 1] to latents (B, C, T', H', W') of about unit variance.

    Attributes:
        config: the frozen dataclass it was built from.
        channels: C.
        temporal_compression: 4 means 4k + 1 frames become k + 1 latent frames.
        spatial_compression: pixels per latent along height and width.
        encodes_in_autocast: whether a training run may encode in its own precision. Codecs of
            others compute as their config says.
    """

    config: Any
    channels: int
    temporal_compression: int
    spatial_compression: int
    encodes_in_autocast: bool = False

    def __repr__(self) -> str:
        """In a line; `torch.nn.Module.__repr__(codec)` shows what is inside."""
        time, space = self.temporal_compression, self.spatial_compression
        return (
            f"{type(self).__name__}(channels={self.channels}, temporal_compression={time}, "
            f"spatial_compression={space}, {described_weights(self)})"
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels; raises InputError for sizes that do not fit."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents."""
        raise NotImplementedError

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of a clip whose first frame is a latent frame of its own.

        Raises InputError for sizes that do not fit, naming the nearest that do.
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
    """Pixels in [-1, 1], clipped to it, to 0..255, rounded to the nearest.

    Raises InputError for pixels that are no numbers, which would come out black.
    """
    bad = int(pixels.isnan().sum())
    if bad:
        raise InputError(
            f"{bad} of {pixels.numel()} values of the pixels are NaN: the model that made them "
            "diverged, or computes in a type that is too narrow"
        )
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def check_output_type(output_type: str) -> None:
    """Raise InputError for one that does not exist."""
    if output_type not in get_args(OutputType):
        raise InputError(
            f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}; "
            "sample_pixels() gives pixels in [-1, 1] on the device"
        )


def to_frames(pixels: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) on the CPU from pixels (B, 3, T, H, W) in [-1, 1]."""
    return to_uint8(pixels).permute(0, 2, 3, 4, 1).contiguous().cpu()


def to_unit(pixels: Tensor) -> Tensor:
    """fp32 (B, T, 3, H, W) in [0, 1] on the CPU from pixels (B, 3, T, H, W) in [-1, 1]."""
    return ((pixels.float() + 1) / 2).clamp(0, 1).transpose(1, 2).contiguous().cpu()


def to_array(unit: Tensor) -> npt.NDArray[np.float32]:
    """(B, T, H, W, 3) from the tensor that `to_unit` gives."""
    array: npt.NDArray[np.float32] = unit.permute(0, 1, 3, 4, 2).contiguous().numpy()
    return array


def to_images(frames: Tensor) -> list[list[Image.Image]]:
    """T images for each video from uint8 (B, T, H, W, 3)."""
    from PIL import Image

    return [[Image.fromarray(frame) for frame in video.numpy()] for video in frames]
