"""Animated WebP, which FFmpeg cannot read, through Pillow."""

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
"""Milliseconds: browsers show a frame that is to last up to 10 for 100."""


def look_webp(source: Source) -> MediaInfo:
    """What it holds, by the headers of its frames."""
    with Image.open(source) as image:
        width, height = image.size
    *starts, _ = accumulate(_durations(source), initial=0)
    if not starts:
        raise DataError(f"{name_of(source)}: holds no frames")
    rate = usual_rate(starts, _TICK, ()) or Fraction(10)
    span = irregular_span(len(starts), starts[-1] * _TICK, rate)
    return MediaInfo(False, width, height, len(starts), rate, "webp", span)


def webp_frames(source: Source) -> Iterator[tuple[Picture, Fraction]]:
    """All frames, each painted over the one before, and their times in seconds."""
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
    """Milliseconds of each frame."""
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
