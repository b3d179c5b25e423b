"""Decoding: what a file holds, and exactly the clip that is asked for.

Videos are decoded with PyAV (FFmpeg) and turned upright by their display rotation; only frames
between the key frame before a clip and the end of the clip are read. Stills are decoded with
Pillow, which applies every EXIF orientation, also the mirrored ones, on every FFmpeg version.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import IO, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from apt.data.buckets import resize_and_crop
from apt.errors import DataError

VIDEO_SUFFIXES = frozenset(
    (
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".mts",
        ".wmv", ".flv", ".ogv", ".3gp",
    )
)  # fmt: skip
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))

Source = str | Path | IO[bytes]
"""A file, or an open binary file that can seek."""


@dataclass(frozen=True)
class MediaInfo:
    """What a file says that it holds.

    Attributes:
        is_image: a still; its `fps` is 0.
        width, height: display size in pixels: upright, with square pixels.
        frames: number of frames.
        fps: average frames per second.
        codec: the codec's or the image format's name.
    """

    is_image: bool
    width: int
    height: int
    frames: int
    fps: Fraction
    codec: str

    @property
    def duration(self) -> float:
        """Seconds; 0 for a still."""
        return float(self.frames / self.fps) if self.fps else 0.0

    def clip_starts(self, num_frames: int, fps: Fraction) -> int:
        """How many source frames a clip of `num_frames` at `fps` can start at; 0 = too short."""
        # Each wanted moment takes the nearest frame, so half a frame may be missing at the end.
        span = (num_frames - 1) * self.fps / fps
        return max(0, math.floor(self.frames - Fraction(1, 2) - span) + 1)

    def clip_frames(self, fps: Fraction) -> int:
        """The length of the longest clip at `fps`, in frames."""
        return math.floor((self.frames - Fraction(1, 2)) * fps / self.fps) + 1


def is_image(path: Path) -> bool:
    """Whether the name is that of a still; everything else is read as a video."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def probe(path: Path) -> MediaInfo:
    """Read a file's headers, and of a video the first frame (its rotation is only known there).

    Raises:
        DataError: if the file cannot be read as what its name says.
    """
    if is_image(path):
        with _reading(path), Image.open(path) as image:
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
            width, height = image.size[::-1] if turned else image.size
            return MediaInfo(True, width, height, 1, Fraction(0), (image.format or "").lower())
    with _reading(path), _open_video(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise DataError(f"{path}: holds no frames")
        rate = _rate(path, stream)
        height, width = display_size(stream, first)
        frames = round(_duration(container, stream, rate) * rate)
        return MediaInfo(False, width, height, max(1, frames), rate, stream.codec_context.name)


def read_image(path: Path, *, size: tuple[int, int] | None = None) -> Tensor:
    """A still as a clip of one frame, upright, over white where it is transparent.

    Args:
        path: the file.
        size: (height, width) to scale and crop to; None keeps its own.

    Returns:
        (3, 1, H, W) float32 in [-1, 1].

    Raises:
        DataError: if the file cannot be decoded.
    """
    with _reading(path), Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            # Pillow clips 16-bit greys instead of scaling them.
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            paper = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(paper, upright)
        frame = np.array(upright.convert("RGB"))
    return _to_pixels(frame, size, None)[:, None]


def read_clip(
    source: Source,
    *,
    start: Fraction,
    num_frames: int,
    fps: Fraction,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """A clip of a video, resampled in time by taking the nearest source frame.

    Reading begins at the key frame before the clip and stops at its end.

    Args:
        source: the file.
        start: time of the first frame in seconds after the video's first.
        num_frames: number of frames T.
        fps: wanted frames per second.
        size: (height, width) to scale and crop each frame to; None keeps the display size.

    Returns:
        (3, T, H, W) float32 in [-1, 1].

    Raises:
        DataError: if the file is unreadable, damaged inside the clip, or ends before it.
    """
    times = [start + i / fps for i in range(num_frames)]
    frames: list[Tensor] = []
    with _reading(source), _open_video(source) as (container, stream):
        previous: VideoFrame | None = None
        for frame in _nearest_frames(source, container, stream, times):
            if frame is not previous:
                pixels = _to_pixels(_upright(frame), size, display_size(stream, frame))
                previous = frame
            frames.append(pixels)
    return torch.stack(frames, dim=1)


def verify(path: Path) -> None:
    """Decode a whole file.

    Raises:
        DataError: at the first damage, or if it ends before its header says.
    """
    if is_image(path):
        read_image(path)
        return
    info = probe(path)
    last = Fraction(0)
    with _reading(path), _open_video(path) as (container, stream):
        for frame, time in _frames_from(path, container, stream, Fraction(0)):
            _refuse_damage(path, frame, time)
            last = max(last, time)
    if last + Fraction(3, 2) / info.fps < info.frames / info.fps:
        raise DataError(_ends_early(path, last + 1 / info.fps, info.frames / info.fps))


def reason(error: DataError, path: Path) -> str:
    """An error of this module without the path that it begins with."""
    return str(error).removeprefix(f"{path}: ")


def display_size(stream: VideoStream, frame: VideoFrame) -> tuple[int, int]:
    """(height, width) at which a frame is to be seen: upright, with square pixels."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width = round(frame.width * max(aspect, Fraction(1)))
    height = round(frame.height / min(aspect, Fraction(1)))
    return (width, height) if _quarter_turns(frame) % 2 else (height, width)


_EXIF_ORIENTATION = 0x0112
_REMUX = "rewrite it with: ffmpeg -i FILE -c:v libx264 -crf 12 FIXED.mp4"


# FFmpeg's, and what Pillow's plugins raise for damaged files of their formats.
_DECODER_ERRORS = (
    FFmpegError,
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _DECODER_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{_name(source)}: cannot be decoded: {reason}") from error


@contextmanager
def _open_video(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    # Foreign bytes in a title are no reason to refuse a video.
    file = str(source) if isinstance(source, Path) else source
    with av.open(file, "r", metadata_errors="replace") as container:
        if not container.streams.video:
            raise DataError(f"{_name(source)}: holds no video stream")
        stream = container.streams.video[0]
        # Attribute access fails on a missing decoder, which the type stubs do not know.
        if cast(object, stream.codec_context) is None:
            raise DataError(f"{_name(source)}: this FFmpeg has no decoder for it; {_REMUX}")
        yield container, stream


def _nearest_frames(
    source: Source, container: InputContainer, stream: VideoStream, times: Sequence[Fraction]
) -> Iterator[VideoFrame]:
    """For each of the ascending `times` (seconds after the first frame), the nearest frame."""
    pending = deque(times)
    before, before_time = None, Fraction(0)
    for frame, time in _frames_from(source, container, stream, times[0]):
        while pending and time >= pending[0]:
            chosen = frame
            if before is not None and pending[0] - before_time < time - pending[0]:
                chosen = before
            _refuse_damage(source, chosen, pending.popleft())
            yield chosen
        if not pending:
            return
        before, before_time = frame, time
    end = before_time + 1 / _rate(source, stream)
    for time in pending:
        if before is None or time > end:
            raise DataError(_ends_early(source, end, times[-1]))
        _refuse_damage(source, before, time)
        yield before


def _frames_from(
    source: Source, container: InputContainer, stream: VideoStream, start: Fraction
) -> Iterator[tuple[VideoFrame, Fraction]]:
    """Frames and their times in seconds, from a key frame at or before `start` on."""
    base = _first_time(stream)
    decoded: Iterator[VideoFrame] = container.decode(stream)
    if start > 0:
        container.seek(_ticks(stream, base + start), stream=stream)
        first = next(decoded, None)
        if first is not None and _time(source, first) - base <= start:
            decoded = chain([first], decoded)
        else:
            # An index can be wrong and lead behind the clip: then read from the beginning.
            container.seek(_ticks(stream, base), stream=stream)
            decoded = container.decode(stream)
    for frame in decoded:
        yield frame, _time(source, frame) - base


def _duration(container: InputContainer, stream: VideoStream, rate: Fraction) -> Fraction:
    """Seconds from the first frame to the end of the last."""
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    # Matroska states only the whole file's length, and its sound can be longer than its pictures.
    pts = []
    if container.duration:
        container.seek(container.duration)
        pts = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    if not pts:
        container.seek(0)
        pts = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    last = max(pts, default=0) * (stream.time_base or Fraction(0))
    return last - _first_time(stream) + 1 / rate


def _rate(source: Source, stream: VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise DataError(f"{_name(source)}: its frame rate is unknown; {_REMUX}")
    return rate


def _first_time(stream: VideoStream) -> Fraction:
    return (stream.start_time or 0) * (stream.time_base or Fraction(0))


def _ticks(stream: VideoStream, seconds: Fraction) -> int:
    return math.floor(seconds / stream.time_base) if stream.time_base else 0


def _time(source: Source, frame: VideoFrame) -> Fraction:
    if frame.pts is None or frame.time_base is None:
        raise DataError(f"{_name(source)}: its frames carry no times; {_REMUX}")
    return frame.pts * frame.time_base


def _refuse_damage(source: Source, frame: VideoFrame, time: Fraction) -> None:
    if frame.is_corrupt:
        raise DataError(f"{_name(source)}: damaged at {float(time):.2f} s")


def _ends_early(source: Source, end: Fraction, wanted: Fraction) -> str:
    return (
        f"{_name(source)}: ends after {float(end):.2f} s, where its header promises "
        f"{float(wanted):.2f} s or more; fetch the file again"
    )


def _quarter_turns(frame: VideoFrame) -> int:
    return round(frame.rotation / 90)


def _upright(frame: VideoFrame) -> NDArray[np.uint8]:
    pixels = cast("NDArray[np.uint8]", frame.to_ndarray(format="rgb24"))
    return np.rot90(pixels, _quarter_turns(frame))


def _to_pixels(
    frame: NDArray[np.uint8], size: tuple[int, int] | None, display: tuple[int, int] | None
) -> Tensor:
    """(h, w, 3) uint8 to (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
    shown = display or (pixels.shape[1], pixels.shape[2])
    return resize_and_crop(pixels, size or shown, display_size=shown)


def _name(source: Source) -> str:
    return str(source if isinstance(source, str | Path) else getattr(source, "name", "the file"))
