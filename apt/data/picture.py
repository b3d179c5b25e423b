"""One decoded frame of a video as the RGB picture that a viewer would see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from apt.data.color import BT2020, UNSPECIFIED, ColorTags
from apt.data.reading import REMUX, Source, name_of
from apt.errors import DataError

if TYPE_CHECKING:
    from av.sidedata.sidedata import SideData
    from av.video.frame import VideoFrame
    from av.video.reformatter import Colorspace
    from av.video.stream import VideoStream

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
"""(h, w, 3), R'G'B', 8 bits, or 16 where 8 are too few."""


@dataclass(frozen=True)
class Picture:
    """A frame that is converted only if it is wanted.

    Attributes:
        pixels: makes the picture: upright, over white where it is transparent.
        size: (height, width) at which it is to be seen, with square pixels.
        damaged: whether the decoder had to guess a part of it.
        tags: how its colours are meant.
    """

    pixels: Callable[[], Pixels]
    size: tuple[int, int]
    damaged: bool
    tags: ColorTags


def picture_of(source: Source, stream: VideoStream, frame: VideoFrame) -> Picture:
    """A frame of `stream` as a `Picture`. Raises DataError for colours that nobody here knows."""
    tags = ColorTags(int(frame.color_primaries), int(frame.color_trc))
    _refuse_foreign_colours(source, stream, frame, tags)
    return Picture(
        pixels=lambda: _upright_rgb(frame, tags),
        size=_display_size(stream, frame),
        damaged=frame.is_corrupt,
        tags=tags,
    )


def _display_size(stream: VideoStream, frame: VideoFrame) -> tuple[int, int]:
    """(height, width) at which a frame is to be seen: upright, with square pixels."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width = round(frame.width * max(aspect, Fraction(1)))
    height = round(frame.height / min(aspect, Fraction(1)))
    return (width, height) if _display_matrix(frame).transposed else (height, width)


@dataclass(frozen=True)
class _Turn:
    """First rows and columns are swapped, then either is reversed."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    def apply(self, pixels: Pixels) -> Pixels:
        turned = pixels.transpose(1, 0, 2) if self.transposed else pixels
        rows = slice(None, None, -1 if self.rows_reversed else None)
        return turned[rows, :: -1 if self.columns_reversed else 1]


def _display_matrix(frame: VideoFrame) -> _Turn:
    """The nearest of the eight ways to lay a picture down to what the file's matrix says."""
    data = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    if data is None:
        return _Turn()
    # (column, row) · matrix = the place on the screen; 16.16 numbers in the machine's order.
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Turn(False, rows_reversed=d < 0, columns_reversed=a < 0)
    return _Turn(True, rows_reversed=b < 0, columns_reversed=c < 0)


# YCgCo, SMPTE 2085, chromaticity-derived, ICtCp, IPT and later ones: FFmpeg's scaler would read
# them as BT.601.
_KNOWN_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9, 10)


def _refuse_foreign_colours(
    source: Source, stream: VideoStream, frame: VideoFrame, tags: ColorTags
) -> None:
    if int(frame.colorspace) not in _KNOWN_MATRICES:
        raise DataError(
            f"{name_of(source)}: its colours are stored by matrix {int(frame.colorspace)} of "
            f"ITU-T H.273, which is not read; {REMUX}"
        )
    # Dolby Vision whose base others can show says how, or goes by another name.
    if stream.codec_context.codec_tag in ("dvh1", "dvhe", "dav1") and not tags.hdr:
        raise DataError(
            f"{name_of(source)}: is Dolby Vision without a picture that other decoders can show; "
            "export it from its app or camera as SDR, HLG or HDR10"
        )


def _source_matrix(frame: VideoFrame, tags: ColorTags) -> Colorspace | None:
    """The matrix of a frame that names none; None leaves FFmpeg's choice, BT.601."""
    from av.video.reformatter import Colorspace

    if int(frame.colorspace) != UNSPECIFIED or frame.format.is_rgb:
        return None
    if tags.hdr or tags.primaries == BT2020:
        return Colorspace.BT2020
    # As players do: what is larger than television was is meant as HD.
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else None


def _upright_rgb(frame: VideoFrame, tags: ColorTags) -> Pixels:
    alpha = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
    # Eight bits of PQ or HLG would leave too few for what an SDR screen shows of them.
    kind = ("rgba" if alpha else "rgb24") if tags.sdr else ("rgba64le" if alpha else "rgb48le")
    # One thread: a pool that is left to the garbage collector hangs a process forked meanwhile.
    converted = frame.reformat(format=kind, src_colorspace=_source_matrix(frame, tags), threads=1)
    pixels = cast(Pixels, converted.to_ndarray())
    if alpha:
        pixels = _over_white(pixels)
    if frame.interlaced_frame:
        pixels = _without_combs(pixels)
    return _display_matrix(frame).apply(pixels)


def _over_white(pixels: Pixels) -> Pixels:
    """(h, w, 4) with straight alpha to (h, w, 3)."""
    full = np.iinfo(pixels.dtype).max
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == full:
        return colour
    share = alpha.astype(np.float32) / full
    blend = colour * share + full * (1 - share)
    return blend.round().astype(pixels.dtype)


def _without_combs(pixels: Pixels) -> Pixels:
    """Where the second field of an interlaced frame was taken at another moment, the first alone.

    Lines of the second field that stand out from both their neighbours, which are the first's,
    become their mean; where nothing moves, the picture keeps all its lines.
    """
    pairs = (pixels.shape[0] - 1) // 2
    above, line, below = (
        pixels[start : start + 2 * pairs : 2].astype(np.int64) for start in (0, 1, 2)
    )
    step = np.iinfo(pixels.dtype).max // 25
    combed = ((above - line) * (below - line) > step**2).any(axis=-1, keepdims=True)
    mended = pixels.copy()
    mended[1 : 1 + 2 * pairs : 2] = np.where(combed, (above + below) // 2, line)
    return mended
