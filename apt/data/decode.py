"""Reading a file's properties, and decoding clips from it.

Videos, GIF, APNG and animated AVIF are decoded with PyAV (FFmpeg), animated WebP and stills with
Pillow. All rotation and mirroring tags and matrices are applied, transparency is composited over
white, and colours are converted to those of an SDR screen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from apt.data.picture import Picture, resize_and_crop, to_sdr
from apt.data.reading import MediaInfo, Source, is_animated_webp, name_of, reading
from apt.data.stills import look_still, read_still, verify_still
from apt.data.suffixes import IMAGE_SUFFIXES
from apt.data.webp import look_webp, webp_frames
from apt.errors import DataError


def is_image(source: Source) -> bool:
    """Return whether the name is that of a still or animated image; the rest are videos."""
    return Path(name_of(source)).suffix.lower() in IMAGE_SUFFIXES


def probe(source: Source) -> MediaInfo:
    """Read a file's properties from its header, and for a video also from the first frame.

    Some formats have no such header: transport and program streams are read to the end, but not
    decoded.

    Raises:
        DataError: if the file cannot be read as the kind of file that its name says.
    """
    if is_image(source):
        with reading(source):
            still = look_still(source)
        if still:
            return still
    with reading(source), _open_moving(source) as moving:
        return moving.info


def read_image(source: Source, *, size: tuple[int, int] | None = None) -> Tensor:
    """Read a still image as a clip of one frame, upright, with transparency over white.

    A JPEG of more than twice `size` is decoded at a half, a quarter or an eighth of its own size.

    Args:
        source: the file.
        size: (height, width) to scale and crop to; None keeps the image's own.

    Returns:
        (3, 1, H, W) float32 in [-1, 1].

    Raises:
        DataError: if the file cannot be decoded.
    """
    with reading(source):
        return read_still(source, size)[:, None]


def read_clip(
    source: Source,
    *,
    start: Fraction,
    num_frames: int,
    fps: Fraction,
    size: tuple[int, int] | None = None,
    info: MediaInfo | None = None,
) -> Tensor:
    """Read a clip of a video, resampled in time to the nearest source frames.

    If a frame is held longer than usual, it is used until half a usual frame duration before the
    next one appears. Reading starts at the key frame before the clip and stops at its end.

    Args:
        source: the file.
        start: time of the first frame in seconds after the video's first.
        num_frames: number of frames T.
        fps: wanted frames per second.
        size: (height, width) to scale and crop each frame to; None keeps the display size.
        info: the result of `probe`, if it is known already.

    Returns:
        (3, T, H, W) float32 in [-1, 1].

    Raises:
        DataError: if the file is unreadable, damaged within the clip, or ends before the clip does.
    """
    times = [start + i / fps for i in range(num_frames)]
    frames: list[Tensor] = []
    with reading(source), _open_moving(source, info) as moving:
        previous: Picture | None = None
        for picture in _nearest(source, moving, times):
            if picture is not previous:
                size = size or picture.size
                pixels = _to_pixels(picture, size)
                previous = picture
            frames.append(pixels)
    return torch.stack(frames, dim=1)


def verify(source: Source) -> MediaInfo:
    """Decode a whole file; returns the same as `probe`.

    Raises:
        DataError: at the first damage, or if the file ends earlier than its header says.
    """
    info = probe(source)
    if info.is_image:
        with reading(source):
            verify_still(source)
        return info
    last = Fraction(0)
    with reading(source), _open_moving(source, info) as moving:
        for picture, time in moving.frames(Fraction(0)):
            _refuse_damage(source, picture, time)
            last = max(last, time)
    if last + Fraction(3, 2) / info.fps < info.length / info.fps:
        raise DataError(_ends_early(source, last + 1 / info.fps, info.length / info.fps))
    return info


class _Frames(Protocol):
    def __call__(self, start: Fraction, /) -> Iterator[tuple[Picture, Fraction]]:
        """Yield frames and their times in seconds, starting at or before `start`."""
        ...


class _Moving(NamedTuple):
    info: MediaInfo
    frames: _Frames


@contextmanager
def _open_moving(source: Source, info: MediaInfo | None = None) -> Iterator[_Moving]:
    if is_animated_webp(source):
        yield _Moving(info or look_webp(source), lambda start: webp_frames(source))
        return
    # Imported here, because only videos need FFmpeg.
    from apt.data.video import frames_from, look, open_video

    with open_video(source) as video:
        if info is None:
            info = look(video)
            video.restart()
        yield _Moving(info, partial(frames_from, video, info))


def _nearest(source: Source, moving: _Moving, times: Sequence[Fraction]) -> Iterator[Picture]:
    """Yield the nearest frame for each of the ascending `times` (seconds after the first frame).

    A frame that appears more than half a usual frame duration later does not count as near; the
    one before it is held.
    """
    pending = deque(times)
    half = 1 / (2 * moving.info.fps)
    before, before_time = None, Fraction(0)
    for picture, time in moving.frames(times[0]):
        while pending and time >= pending[0]:
            wait = time - pending[0]
            early = before is None or wait <= min(half, pending[0] - before_time)
            chosen = picture if early or before is None else before
            _refuse_damage(source, chosen, pending.popleft())
            yield chosen
        if not pending:
            return
        before, before_time = picture, time
    end = before_time + 1 / moving.info.fps
    for time in pending:
        if before is None or time > end:
            raise DataError(_ends_early(source, end, times[-1]))
        _refuse_damage(source, before, time)
        yield before


def _refuse_damage(source: Source, picture: Picture, time: Fraction) -> None:
    if picture.damaged:
        raise DataError(
            f"{name_of(source)}: damaged at {float(time):.2f} s; copy or download the file again"
        )


def _ends_early(source: Source, end: Fraction, wanted: Fraction) -> str:
    return (
        f"{name_of(source)}: ends after {float(end):.2f} s, but its header promises "
        f"{float(wanted):.2f} s or more; copy or download the file again"
    )


def _to_pixels(picture: Picture, size: tuple[int, int]) -> Tensor:
    """Return a picture as (3, H, W) float32 in [-1, 1]."""
    pixels = picture.pixels()
    if pixels.dtype == np.uint16:
        # FFmpeg scales 8 bits to 16 bits by 256.
        frame = torch.from_numpy(pixels.astype(np.float32) / 256)
    else:
        frame = torch.from_numpy(pixels.copy())
    frame = frame.permute(2, 0, 1)
    return to_sdr(resize_and_crop(frame, size, display_size=picture.size), picture.tags)
