"""Recognising media files by their names."""

from __future__ import annotations

import mimetypes
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    (
        ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".mpg", ".mpeg", ".mpe",
        ".m1v", ".m2v", ".mpv", ".vob", ".ts", ".tp", ".trp", ".mts", ".m2t", ".m2ts", ".wmv",
        ".asf", ".flv", ".f4v", ".ogv", ".ogm", ".3gp", ".3g2", ".mxf", ".dv", ".rm", ".rmvb",
        ".insv", ".lrv", ".360",
    )
)  # fmt: skip
IMAGE_SUFFIXES = frozenset(
    (
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".gif", ".webp", ".bmp", ".dib",
        ".tif", ".tiff", ".avif", ".avifs", ".heic", ".heif", ".hif", ".jp2", ".ppm",
    )
)  # fmt: skip
"""Still and animated images; GIF, APNG, WebP and AVIF can be either."""

_HEADS = (
    (0, b"\x1aE\xdf\xa3"),  # Matroska
    (0, b"RIFF"),
    (0, b"\x89PNG"),
    (0, b"\xff\xd8\xff"),  # JPEG
    (0, b"GIF8"),
    (0, b"\x00\x00\x01\xba"),  # MPEG program stream
    (0, b"FLV"),
    (0, b"\x30\x26\xb2\x75"),  # ASF
    (4, b"ftyp"),  # MP4 and its kin
)


def is_media(path: Path) -> bool:
    """Return whether the name is that of a video or an image."""
    return path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES


def may_be_media(path: Path) -> bool:
    """Return whether a file with another suffix looks like media, by its name or first bytes.

    Raises:
        OSError: if it cannot be read.
    """
    kind, _ = mimetypes.guess_type(path.name)
    kind = (kind or "").partition("/")[0]
    if kind in ("video", "image", "audio"):
        return kind != "audio"
    with path.open("rb") as file:
        head = file.read(16)
    return any(head[at:].startswith(mark) for at, mark in _HEADS)
