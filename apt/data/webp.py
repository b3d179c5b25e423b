"""Animated WebP, which FFmpeg cannot read, read with Pillow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from itertools import accumulate

import numpy as np
from PIL import Image

from apt.data.picture import ColorTags, Picture, Pixels
from apt.data.reading import MediaInfo, Source, bytes_at, bytes_of, name_of
from apt.data.timeline import irregular_span, usual_rate
from apt.errors import DataError

_TICK = Fraction(1, 1000)

_SHORTEST, _INSTEAD = 10, 100
"""Milliseconds. Browsers show a frame with a duration of up to 10 ms for 100 ms."""


def look_webp(source: Source) -> MediaInfo:
    """Read the file's properties from the headers of its frames."""
    with Image.open(source) as image:
        width, height = image.size
    *starts, _ = accumulate(_durations(source), initial=0)
    if not starts:
        raise DataError(f"{name_of(source)}: holds no frames")
    rate = usual_rate(starts, _TICK, ()) or Fraction(10)
    span = irregular_span(len(starts), starts[-1] * _TICK, rate)
    return MediaInfo(False, width, height, len(starts), rate, "webp", span)


def webp_frames(source: Source) -> Iterator[tuple[Picture, Fraction]]:
    """Yield all frames, each drawn over the previous one, and their times in seconds."""
    with Image.open(source) as image:
        for number, start in enumerate(accumulate(_durations(source), initial=0)):
            if number == getattr(image, "n_frames", 1):
                return
            image.seek(number)
            picture = image.convert("RGBA")
            paper = Image.new("RGBA", picture.size, "white")
            pixels = np.asarray(Image.alpha_composite(paper, picture).convert("RGB"))
            height, width = pixels.shape[:2]
            yield (
                Picture(partial(_same, pixels), (height, width), False, ColorTags()),
                start * _TICK,
            )


def _same(pixels: Pixels) -> Pixels:
    return pixels


def _durations(source: Source) -> list[int]:
    """Return the duration of each frame in milliseconds."""
    found = []
    with bytes_of(source) as file:
        at = 12
        while len(head := bytes_at(file, at, 24)) >= 8:
            size = struct.unpack("<I", head[4:8])[0]
            if head[:4] == b"ANMF" and len(head) == 24:
                duration = int.from_bytes(head[20:23], "little")
                found.append(duration if duration > _SHORTEST else _INSTEAD)
            at += 8 + size + size % 2
    return found
