"""Input files: their captions and properties, and decoders' errors as `DataError`."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

from PIL import Image

from apt.errors import DataError

Source = str | Path | IO[bytes]
"""A path, or an open binary file that can seek."""

REMUX = "rewrite it with: ffmpeg -i FILE -c:v libx264 -crf 12 FIXED.mp4"

# Exceptions that Pillow's plugins raise for damaged files.
_PILLOW_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Entry:
    """A file with its caption; `name` is its path relative to the folder, with slashes."""

    path: Path
    name: str
    caption: str

    @property
    def place(self) -> Hashable:
        """A key that identifies the file; entries for several captions of a file share it."""
        return self.path

    @contextmanager
    def at_hand(self) -> Iterator[Source]:
        """Yield the file for reading."""
        yield self.path


@dataclass(frozen=True)
class MediaInfo:
    """A file's properties.

    Attributes:
        is_image: whether it is a still, whose `fps` is 0.
        width, height: display size in pixels, upright, with square pixels.
        frames: number of frames.
        fps: the usual frame rate. If the rate varies or some frames are held, it is the rate of
            most frames.
        codec: name of the codec or image format.
        span: seconds from the first frame to the last, if this differs from an even rate of `fps`.
            The duration of the last frame is not included.
        first: timestamp of the first decodable frame, in seconds.
    """

    is_image: bool
    width: int
    height: int
    frames: int
    fps: Fraction
    codec: str
    span: Fraction | None = None
    first: Fraction = Fraction(0)

    @property
    def duration(self) -> float:
        """Seconds; 0 for a still."""
        return float(self.length / self.fps) if self.fps else 0.0

    @property
    def length(self) -> Fraction:
        """The number of frames that the file would have at an even rate of `fps`."""
        return Fraction(self.frames) if self.span is None else self.span * self.fps + 1

    def clip_starts(self, num_frames: int, fps: Fraction) -> int:
        """Return the number of times, 1 / `self.fps` apart, at which such a clip can start.

        It is 0 if the file is too short for `num_frames` at `fps`.
        """
        # Each time takes the nearest frame, so half a frame may be missing at the end.
        span = (num_frames - 1) * self.fps / fps
        return max(0, math.floor(self.length - Fraction(1, 2) - span) + 1)

    def clip_frames(self, fps: Fraction) -> int:
        """Return the length of the longest clip at `fps`, in frames."""
        return math.floor((self.length - Fraction(1, 2)) * fps / self.fps) + 1


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn decoders' errors in the block into a DataError that begins with the file's name."""
    try:
        yield
    except DataError:
        raise
    except _decoder_errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name_of(source)}: cannot be decoded: {reason}") from error


def _decoder_errors() -> tuple[type[Exception], ...]:
    """Return Pillow's exceptions, and FFmpeg's if PyAV has been imported."""
    ffmpeg = sys.modules.get("av.error")
    return _PILLOW_ERRORS if ffmpeg is None else (*_PILLOW_ERRORS, ffmpeg.FFmpegError)


def name_of(source: Source) -> str:
    """Return the name of the file for messages."""
    return str(source if isinstance(source, str | Path) else getattr(source, "name", "the file"))


def reason(error: DataError, source: Source) -> str:
    """Return a reader's error message without the file name that it begins with."""
    return str(error).removeprefix(f"{name_of(source)}: ")


def is_animated_webp(source: Source) -> bool:
    """Return whether a file is an animated WebP, by its first bytes.

    Raises OSError if it cannot be read.
    """
    with bytes_of(source) as file:
        head = bytes_at(file, 0, 21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20:] and head[20] & 2)


@contextmanager
def bytes_of(source: Source) -> Iterator[IO[bytes]]:
    """Yield the file, open; a file that was passed open gets its position back afterwards."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            yield file
    else:
        before = source.tell()
        yield source
        source.seek(before)


def bytes_at(file: IO[bytes], place: int, size: int) -> bytes:
    """Read `size` bytes at an offset."""
    file.seek(place)
    return file.read(size)
