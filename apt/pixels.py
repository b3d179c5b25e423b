"""Pixels in [-1, 1] as callers want them: in 8 bits, and as diffusers' `output_type`s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apt.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

OutputType = Literal["uint8", "pt", "np", "pil"]
"""What a call returns, always on the CPU:

- "uint8": a tensor (B, T, H, W, 3);
- "pt": an fp32 tensor (B, T, 3, H, W) in [0, 1], as diffusers;
- "np": an fp32 array (B, T, H, W, 3) in [0, 1], as diffusers;
- "pil": a list of T images for each video, as diffusers.
"""


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
