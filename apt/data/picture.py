"""Conversion of decoded frames to what a viewer would see: upright, scaled, in SDR colours.

The numbers of matrices, transfer functions and primaries are those of ITU-T H.273, as in all
containers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from apt.data.reading import REMUX, Source, name_of
from apt.errors import DataError

if TYPE_CHECKING:
    from av.sidedata.sidedata import SideData
    from av.video.frame import VideoFrame
    from av.video.reformatter import Colorspace
    from av.video.stream import VideoStream

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
"""(h, w, 3), R'G'B', with 8 bits, or 16 if 8 are too few."""

UNSPECIFIED, PQ, HLG = 2, 16, 18

BT2020, _DCI_P3, _DISPLAY_P3 = 9, 11, 12

_TO_BT709 = {
    BT2020: (
        (1.660491, -0.587641, -0.072850),
        (-0.124550, 1.132900, -0.008349),
        (-0.018151, -0.100579, 1.118730),
    ),
    _DISPLAY_P3: (
        (1.224940, -0.224940, 0.0),
        (-0.042057, 1.042057, 0.0),
        (-0.019638, -0.078636, 1.098274),
    ),
}
"""Matrices of linear light from other primaries to BT.709 (ITU-R BT.2087, SMPTE EG 432-1)."""

_REFERENCE_WHITE = 203.0
"""Luminance of reference white in PQ, in cd/m² (ITU-R BT.2408)."""

_HLG_WHITE = 0.75
"""HLG signal of reference white (ITU-R BT.2408)."""

_BAND = 2**22
"""Pixels to scale at once."""

_STRIP = 16
"""A picture so many times longer than what is kept of it is cut before it is scaled."""


class ColorTags(NamedTuple):
    """A source's description of its colours."""

    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED

    @property
    def hdr(self) -> bool:
        """Whether values mean light up to 10,000 cd/m² (PQ), or 12 times a scene's white (HLG)."""
        return self.transfer in (PQ, HLG)

    @property
    def sdr(self) -> bool:
        """Whether the pixels need no conversion for an SDR screen."""
        return not self.hdr and self.primaries not in (BT2020, _DCI_P3, _DISPLAY_P3)


@dataclass(frozen=True)
class Picture:
    """A frame that is converted lazily.

    Attributes:
        pixels: returns the picture, upright, with transparency over white.
        size: display size (height, width), with square pixels.
        damaged: whether the decoder had to guess part of it.
        tags: description of its colours.
    """

    pixels: Callable[[], Pixels]
    size: tuple[int, int]
    damaged: bool
    tags: ColorTags


def picture_of(source: Source, stream: VideoStream, frame: VideoFrame) -> Picture:
    """Return a frame of `stream` as a `Picture`. Raises DataError for unsupported colours."""
    tags = ColorTags(int(frame.color_primaries), int(frame.color_trc))
    _refuse_foreign_colours(source, stream, frame, tags)
    return Picture(
        pixels=lambda: _upright_rgb(frame, tags),
        size=_display_size(stream, frame),
        damaged=frame.is_corrupt,
        tags=tags,
    )


def _display_size(stream: VideoStream, frame: VideoFrame) -> tuple[int, int]:
    """Return the display size (height, width) of a frame: upright, with square pixels."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width = round(frame.width * max(aspect, Fraction(1)))
    height = round(frame.height / min(aspect, Fraction(1)))
    return (width, height) if _display_matrix(frame).transposed else (height, width)


@dataclass(frozen=True)
class _Turn:
    """A rotation or mirroring: rows and columns are swapped first, then each may be reversed."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    def apply(self, pixels: Pixels) -> Pixels:
        turned = pixels.transpose(1, 0, 2) if self.transposed else pixels
        rows = slice(None, None, -1 if self.rows_reversed else None)
        return turned[rows, :: -1 if self.columns_reversed else 1]


def _display_matrix(frame: VideoFrame) -> _Turn:
    """Return the orientation, among the eight possible, that is nearest to the file's matrix."""
    data = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    if data is None:
        return _Turn()
    # (column, row) · matrix = the place on the screen; 16.16 numbers in native byte order.
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Turn(False, rows_reversed=d < 0, columns_reversed=a < 0)
    return _Turn(True, rows_reversed=b < 0, columns_reversed=c < 0)


# Not YCgCo, SMPTE 2085, chromaticity-derived, ICtCp, IPT and later ones, which FFmpeg's scaler
# would read as BT.601.
_KNOWN_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9, 10)


def _refuse_foreign_colours(
    source: Source, stream: VideoStream, frame: VideoFrame, tags: ColorTags
) -> None:
    if int(frame.colorspace) not in _KNOWN_MATRICES:
        raise DataError(
            f"{name_of(source)}: its colours use matrix {int(frame.colorspace)} of ITU-T H.273, "
            f"which is not supported; {REMUX}"
        )
    # Dolby Vision with a compatible base layer has HDR tags, or another codec tag.
    if stream.codec_context.codec_tag in ("dvh1", "dvhe", "dav1") and not tags.hdr:
        raise DataError(
            f"{name_of(source)}: is Dolby Vision without a base layer for other decoders; export "
            "it from its app or camera as SDR, HLG or HDR10"
        )


def _source_matrix(frame: VideoFrame, tags: ColorTags) -> Colorspace | None:
    """Return the matrix for a frame that names none; None keeps FFmpeg's choice, BT.601."""
    from av.video.reformatter import Colorspace

    if int(frame.colorspace) != UNSPECIFIED or frame.format.is_rgb:
        return None
    if tags.hdr or tags.primaries == BT2020:
        return Colorspace.BT2020
    # As in video players: frames larger than standard definition are HD.
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else None


def _upright_rgb(frame: VideoFrame, tags: ColorTags) -> Pixels:
    alpha = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
    # 8 bits of PQ or HLG would leave too few for the range that an SDR screen shows.
    kind = ("rgba" if alpha else "rgb24") if tags.sdr else ("rgba64le" if alpha else "rgb48le")
    # One thread, because a thread pool that the garbage collector frees hangs forked processes.
    converted = frame.reformat(format=kind, src_colorspace=_source_matrix(frame, tags), threads=1)
    pixels = cast(Pixels, converted.to_ndarray())
    if alpha:
        pixels = _over_white(pixels)
    if frame.interlaced_frame:
        pixels = _without_combs(pixels)
    return _display_matrix(frame).apply(pixels)


def _over_white(pixels: Pixels) -> Pixels:
    """Composite (h, w, 4) with straight alpha over white; returns (h, w, 3)."""
    full = np.iinfo(pixels.dtype).max
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == full:
        return colour
    share = alpha.astype(np.float32) / full
    blend = colour * share + full * (1 - share)
    return blend.round().astype(pixels.dtype)


def _without_combs(pixels: Pixels) -> Pixels:
    """Deinterlace a frame where it moves.

    Pixels of the second field that stand out from both neighbours, which belong to the first field,
    are replaced by the mean of the two. Where nothing moves, the frame keeps all its lines.
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


def resize_and_crop(
    frame: Tensor, size: tuple[int, int], *, display_size: tuple[int, int] | None = None
) -> Tensor:
    """Scale a frame to cover `size` (bicubic, antialiased) and crop the centre.

    Rows are scaled in bands, so that a large photo is never held in memory as floats.

    Args:
        frame: (3, h, w) in [0, 255], uint8 or float32.
        size: wanted (height, width).
        display_size: display size (height, width) of the frame, if its pixels are not square; None
            is the frame's own size.

    Returns:
        (3, height, width) float32 in [-1, 1]; not resampled if the sizes agree.
    """
    height, width = size
    shown_height, shown_width = display_size or (frame.shape[1], frame.shape[2])
    too_long = shown_height * width / (shown_width * height)
    if max(too_long, 1 / too_long) > _STRIP:
        # Scaled whole, a strip of a few kilobytes in a file would take gigabytes.
        along, share = (1, 2 / too_long) if too_long > 1 else (2, 2 * too_long)
        whole = frame.shape[along]
        kept = math.ceil(whole * share)
        frame = frame.narrow(along, (whole - kept) // 2, kept)
        if along == 1:
            shown_height = math.ceil(shown_height * kept / whole)
        else:
            shown_width = math.ceil(shown_width * kept / whole)
    scale = max(height / shown_height, width / shown_width)
    scaled = (max(height, round(shown_height * scale)), max(width, round(shown_width * scale)))
    if scaled == tuple(frame.shape[1:]):
        pixels = frame.to(torch.float32)
    else:
        rows = max(1, _BAND // frame.shape[2])
        bands = [_scale(band, (band.shape[1], scaled[1])) for band in frame.split(rows, dim=1)]
        pixels = _scale(torch.cat(bands, dim=1), scaled)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    pixels = pixels[:, top : top + height, left : left + width]
    return (pixels / 127.5 - 1).clamp_(-1, 1)


def _scale(frame: Tensor, size: tuple[int, int]) -> Tensor:
    pixels = frame.to(torch.float32)[None]
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)[0]


def to_sdr(pixels: Tensor, tags: ColorTags) -> Tensor:
    """Convert pixels to the colours of an SDR screen.

    In HDR, reference white becomes white and brighter values are clipped, as in the HDR-to-SDR hard
    clip of ITU-R BT.2408; light below is kept and encoded as sRGB. Colours outside the gamut of an
    SDR screen are clipped.

    Args:
        pixels: (3, ...) in [-1, 1], R'G'B' as decoded.
        tags: description of their colours.

    Returns:
        The same shape, in [-1, 1].
    """
    if tags.sdr:
        return pixels
    signal = ((pixels + 1) / 2).clamp(0, 1)
    if tags.transfer == PQ:
        light = _pq_light(signal) / _REFERENCE_WHITE
    elif tags.transfer == HLG:
        light = _hlg_light(signal) / _hlg_light(torch.tensor(_HLG_WHITE))
    else:
        light = signal**2.4
    # HDR has BT.2020 primaries unless tagged otherwise. The two P3 differ only in their white.
    primaries = _DISPLAY_P3 if tags.primaries in (_DCI_P3, _DISPLAY_P3) else BT2020
    light = torch.einsum("oi,i...->o...", light.new_tensor(_TO_BT709[primaries]), light)
    light = light.clamp(0, 1)
    signal = _srgb_signal(light) if tags.hdr else light ** (1 / 2.4)
    return signal * 2 - 1


def _pq_light(signal: Tensor) -> Tensor:
    """Convert a signal in [0, 1] to cd/m² (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = signal ** (1 / m2)
    return 10000 * ((power - c1).clamp(min=0) / (c2 - c3 * power)) ** (1 / m1)


def _hlg_light(signal: Tensor) -> Tensor:
    """Convert a signal in [0, 1] to scene light in [0, 1] (ARIB STD-B67)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return torch.where(signal <= 0.5, signal**2 / 3, (((signal - c) / a).exp() + b) / 12)


def _srgb_signal(light: Tensor) -> Tensor:
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
