"""Files that are read: their captions, what they say that they hold, and errors of all that reads
them as `DataError`."""

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
"""A file, or an open binary file that can seek."""

REMUX = "rewrite it with: ffmpeg -i FILE -c:v libx264 -crf 12 FIXED.mp4"

# What Pillow's plugins raise for damaged files of their formats.
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
        """What tells the file from others; several captions have it in common."""
        return self.path

    @contextmanager
    def at_hand(self) -> Iterator[Source]:
        """The file by itself, for as long as it is read."""
        yield self.path


@dataclass(frozen=True)
class MediaInfo:
    """What a file says that it holds.

    Attributes:
        is_image: a still; its `fps` is 0.
        width, height: display size in pixels: upright, with square pixels.
        frames: number of frames.
        fps: the usual frames per second: of a variable rate, or where single frames are held, the
            rate of the others.
        codec: the codec's or the image format's name.
        span: seconds from the first frame to the last, where that is not what the frames take at
            `fps`. How long the last frame is held does not count.
        first: what the file's clock says at the first frame that can be decoded, in seconds.
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
        """How many frames the file would have if all of it had the rate `fps`."""
        return Fraction(self.frames) if self.span is None else self.span * self.fps + 1

    def clip_starts(self, num_frames: int, fps: Fraction) -> int:
        """How many moments, 1 / `self.fps` apart, a clip of `num_frames` at `fps` can start at.

        0 = too short.
        """
        # Each wanted moment takes the nearest frame, so half a frame may be missing at the end.
        span = (num_frames - 1) * self.fps / fps
        return max(0, math.floor(self.length - Fraction(1, 2) - span) + 1)

    def clip_frames(self, fps: Fraction) -> int:
        """The length of the longest clip at `fps`, in frames."""
        return math.floor((self.length - Fraction(1, 2)) * fps / self.fps) + 1


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Decoders' errors inside the block become a DataError that begins with the file's name."""
    try:
        yield
    except DataError:
        raise
    except _decoder_errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name_of(source)}: cannot be decoded: {reason}") from error


def _decoder_errors() -> tuple[type[Exception], ...]:
    """Pillow's and FFmpeg's; the latter cannot come from a PyAV that nobody imported."""
    ffmpeg = sys.modules.get("av.error")
    return _PILLOW_ERRORS if ffmpeg is None else (*_PILLOW_ERRORS, ffmpeg.FFmpegError)


def name_of(source: Source) -> str:
    """What messages call the file."""
    return str(source if isinstance(source, str | Path) else getattr(source, "name", "the file"))


def reason(error: DataError, source: Source) -> str:
    """An error of a reader without the name that it begins with."""
    return str(error).removeprefix(f"{name_of(source)}: ")


def is_animated_webp(source: Source) -> bool:
    """Whether a file is one, by its first bytes. Raises OSError if it cannot be read."""
    with bytes_of(source) as file:
        head = bytes_at(file, 0, 21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20:] and head[20] & 2)


@contextmanager
def bytes_of(source: Source) -> Iterator[IO[bytes]]:
    """The file, open; one that was open before is put back where it was."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            yield file
    else:
        before = source.tell()
        yield source
        source.seek(before)


def bytes_at(file: IO[bytes], place: int, size: int) -> bytes:
    """So many bytes from a place on."""
    file.seek(place)
    return file.read(size)
