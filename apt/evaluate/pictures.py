"""Pictures as image metrics see them: read from files, cropped, resized as clean-fid does.

A picture is uint8 (H, W, 3), as a viewer shows it: upright by its EXIF tag, over white where it is
transparent, grey as three equal channels, its colour profile turned into sRGB. For plain RGB and
grey files these are the pixels that Pillow's `convert("RGB")` gives, as in clean-fid; where a file
is turned, transparent or has a profile, clean-fid looks at what nobody sees.
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
"""(H, W, 3) in [0, 255]: uint8, or float32 after a resize, which is not rounded."""


def list_pictures(folder: Path) -> list[Path]:
    """Image files below a folder, sorted by their path in it.

    Raises DataError for no such folder, or one without images.
    """
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder; name one with images (JPEG, PNG, ...)")
    found = sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path))
    if not found:
        raise DataError(f"{str(folder)!r} holds no images; name a folder with JPEG or PNG files")
    return found


def read_picture(path: Path) -> NDArray[np.uint8]:
    """A file as uint8 (H, W, 3). Raises DataError if it cannot be decoded."""
    pixels = to_uint8(read_image(path)[:, 0])
    picture: NDArray[np.uint8] = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return picture


def crop_square(picture: Picture) -> Picture:
    """The largest square in the middle; what is odd goes to the bottom and to the right."""
    height, width = picture.shape[:2]
    side = min(height, width)
    return _cut(picture, side)


def crop_middle(picture: Picture, side: int) -> Picture:
    """A square of `side` pixels in the middle, without resizing.

    Raises InputError for a picture that is smaller.
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
    """To `size` (height, width) as clean-fid's "clean" mode (Parmar et al., 2022).

    Each channel by itself in float32 with Pillow's bicubic filter, which widens with the scale
    (antialiasing); clipped to [0, 255], and not rounded to whole numbers.
    """
    channels = [
        Image.fromarray(np.ascontiguousarray(picture[..., channel], dtype=np.float32)).resize(
            (size[1], size[0]), resample=Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=-1)


def upsample(picture: Picture, shorter_side: int) -> NDArray[np.float32]:
    """Bilinear, so that the shorter side has so many pixels; not rounded."""
    height, width = picture.shape[:2]
    scale = shorter_side / min(height, width)
    size = (round(height * scale), round(width * scale))
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None]
    larger = F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
    result: NDArray[np.float32] = larger.permute(1, 2, 0).contiguous().numpy()
    return result
