"""Still images, read with Pillow: upright, in sRGB, over white, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from io import BytesIO
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from apt.data.picture import resize_and_crop, to_sdr
from apt.data.reading import MediaInfo, Source, bytes_at, bytes_of, name_of
from apt.data.tags import color_tags, orientation
from apt.errors import DataError, MissingDecoderError

MAX_PIXELS = 2**28
"""The largest picture, 268 megapixels. Pillow's own limit would reject photos from phones."""

_LARGE = 2**25
_ONE_AT_A_TIME = threading.Lock()
"""Held while decoding a picture of more than 32 megapixels, so that threads decode only one."""

_PILLOW_LIMIT = threading.Lock()

_OF_DAMAGE = (TypeError, LookupError, ArithmeticError, RuntimeError)
"""What Pillow's plugins raise for damaged files, besides the errors that `reading` expects. These
types are too broad to catch elsewhere."""

_MOVING = ("GIF", "PNG", "WEBP", "AVIF")


def look_still(source: Source) -> MediaInfo | None:
    """Read a picture's properties from its header; returns None if it is animated.

    Raises:
        DataError: if it is too large, or the file has several pages.
    """
    with _opened(source) as image:
        if image.format in _MOVING and getattr(image, "n_frames", 1) > 1:
            return None
        _refuse_pages(source, image)
        width, height = image.size if orientation(source, image) < 5 else image.size[::-1]
        return MediaInfo(True, width, height, 1, Fraction(0), (image.format or "").lower())


def read_still(source: Source, size: tuple[int, int] | None) -> Tensor:
    """Read a picture as (3, H, W) float32 in [-1, 1], scaled and cropped to `size`, (h, w)."""
    with _opened(source) as image:
        turn = orientation(source, image)
        shown = image.size[::-1] if turn < 5 else image.size
        if size:
            _reduce(image, size if turn < 5 else size[::-1])
        with _turn_to_decode(image):
            tags = color_tags(source, image)
            stored = np.array(_rgb(source, image, convert_profile=tags.sdr))
    pixels = _UPRIGHT[turn](stored)
    frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return to_sdr(resize_and_crop(frame, size or shown, display_size=shown), tags)


def verify_still(source: Source) -> None:
    """Decode a whole picture, at a reduced size if its format allows that."""
    with _opened(source) as image:
        _refuse_pages(source, image)
        _reduce(image, (1, 1))
        with _turn_to_decode(image):
            _rgb(source, image, convert_profile=False)


# Functions that turn a stored picture (h, w, 3) upright, by EXIF orientation.
_UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    try:
        image = _open_any(source)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{name_of(source)}: {image.width}x{image.height} pixels are more than "
                    f"{MAX_PIXELS:,}; scale it down"
                )
            yield image
    except _OF_DAMAGE as error:
        raise DataError(f"{name_of(source)}: cannot be decoded: {error}") from error


def _open_any(source: Source) -> Image.Image:
    try:
        return _open(source)
    except UnidentifiedImageError:
        if not _is_heic(source):
            raise
        _let_pillow_read_heic(source)
        return _open(source)


def _open(source: Source) -> Image.Image:
    with _PILLOW_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _is_heic(source: Source) -> bool:
    """Return whether a file is HEIC, by its first bytes: phones and apps also call these .jpg."""
    with bytes_of(source) as file:
        head = bytes_at(file, 0, 64)
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return head[4:8] == b"ftyp" and any(brand in head[8:] for brand in brands)


def _let_pillow_read_heic(source: Source) -> None:
    try:
        import pi_heif
    except ImportError:
        raise MissingDecoderError(
            f"{name_of(source)}: is HEIC, which needs pi-heif; run "
            "`pip install 'diffusion-apt[heic]'`"
        ) from None
    pi_heif.register_heif_opener()


def _refuse_pages(source: Source, image: Image.Image) -> None:
    """Raise DataError for a TIFF with several pages; smaller copies of the first do not count."""
    if image.format != "TIFF" or getattr(image, "n_frames", 1) == 1:
        return
    size, pages = image.size, 1
    for number in range(1, getattr(image, "n_frames", 1)):
        image.seek(number)
        pages += image.size == size
    image.seek(0)
    if pages > 1:
        raise DataError(
            f"{name_of(source)}: holds {pages} pages, but only the first would be used; save each "
            "page as a file"
        )


def _reduce(image: Image.Image, size: tuple[int, int]) -> None:
    """Let a JPEG decode at 1/2, 1/4 or 1/8 of its size, if that is still twice `size` (h, w)."""
    scale = max(size[0] / image.height, size[1] / image.width)
    image.draft(None, (round(2 * scale * image.width), round(2 * scale * image.height)))


@contextmanager
def _turn_to_decode(image: Image.Image) -> Iterator[None]:
    with _ONE_AT_A_TIME if image.width * image.height > _LARGE else nullcontext():
        yield


def _rgb(source: Source, image: Image.Image, *, convert_profile: bool) -> Image.Image:
    """Return the whole picture as stored, in 8 bits, over white."""
    image.load()
    if image.mode == "F" or (image.mode == "I" and cast(int, image.getextrema()[1]) > 65535):
        raise DataError(
            f"{name_of(source)}: holds 32-bit values, whose white level is unknown; save it with 8 "
            "or 16 bits"
        )
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit greys instead of scaling them.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    transparent = image.has_transparency_data
    if transparent:
        image = image.convert("RGBA")
    if convert_profile and "icc_profile" in image.info:
        image = _in_srgb(image)
    if transparent:
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=image.getchannel("A"))
        image = paper
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert from the picture's own colour profile to sRGB.

    A profile that cannot be read counts as sRGB, as in browsers.
    """
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        if image.mode == "P":
            image = image.convert("RGB")
        spaces = {"L": "GRAY", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}
        if profile.profile.xcolor_space.strip() != spaces.get(image.mode):
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        srgb = ImageCms.createProfile("sRGB")
        turned = ImageCms.profileToProfile(image, profile, srgb, outputMode=mode)
        return cast(Image.Image, turned)
    except (ImageCms.PyCMSError, OSError):
        return image
