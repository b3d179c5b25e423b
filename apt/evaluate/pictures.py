"""Read, crop and resize pictures for image metrics, as clean-fid does.

A picture is uint8 (H, W, 3), as a viewer shows it: rotated as its EXIF tag says, transparency over
white, grey as three equal channels, the colour profile converted to sRGB. For plain RGB and grey
files these are the pixels of Pillow's `convert("RGB")`, as in clean-fid. If a file is rotated, is
transparent or has a profile, clean-fid uses pixels that no viewer shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from apt.data.decode import is_image, read_image
from apt.errors import DataError, InputError
from apt.pixels import to_uint8

Picture = NDArray[np.uint8] | NDArray[np.float32]
"""(H, W, 3) in [0, 255]: uint8, or float32 after a resize, which does not round."""


def list_pictures(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by path.

    Raises DataError for a folder that does not exist or has no images.
    """
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is not a folder; name one with images (JPEG, PNG, ...)")
    found = sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path))
    if not found:
        raise DataError(f"{str(folder)!r} has no images; name a folder with JPEG or PNG files")
    return found


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Read a file as uint8 (H, W, 3). Raises DataError if it cannot be decoded."""
    pixels = to_uint8(read_image(path)[:, 0])
    picture: NDArray[np.uint8] = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return picture


def crop_square(picture: Picture) -> Picture:
    """Crop the largest centred square; an odd pixel is cut off at the bottom or right."""
    height, width = picture.shape[:2]
    side = min(height, width)
    return _cut(picture, side)


def crop_middle(picture: Picture, side: int) -> Picture:
    """Crop a centred square of `side` pixels, without resizing.

    Raises InputError for a smaller picture.
    """
    if min(picture.shape[:2]) < side:
        height, width = picture.shape[:2]
        raise InputError(
            f"a picture of {width}x{height} pixels has no patch of {side}x{side}; "
            "use larger pictures"
        )
    return _cut(picture, side)


def _cut(picture: Picture, side: int) -> Picture:
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return picture[top : top + side, left : left + side]


def clean_resize(picture: Picture, size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize to `size` (height, width) like clean-fid's "clean" mode (Parmar et al., 2022).

    Each channel is resized in float32 with Pillow's bicubic filter, which widens with the scale
    (antialiasing). The result is clipped to [0, 255], and not rounded.
    """
    channels = [
        Image.fromarray(np.ascontiguousarray(picture[..., channel], dtype=np.float32)).resize(
            (size[1], size[0]), resample=Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=-1)


def upsample(picture: Picture, shorter_side: int) -> NDArray[np.float32]:
    """Resize bilinearly to a shorter side of `shorter_side` pixels, without rounding values."""
    height, width = picture.shape[:2]
    scale = shorter_side / min(height, width)
    size = (round(height * scale), round(width * scale))
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None]
    larger = F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
    result: NDArray[np.float32] = larger.permute(1, 2, 0).contiguous().numpy()
    return result
