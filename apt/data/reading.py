"""Files that are read, and the errors of everything that reads them as `DataError`."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def reason(error: DataError, path: Path) -> str:
    """An error of a reader without the path that it begins with."""
    return str(error).removeprefix(f"{path}: ")
