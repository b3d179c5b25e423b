"""Open video files with FFmpeg so that no name or content leads to another file or address."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.container import InputContainer

# A playlist, whatever its own name, can name any file or address; media files cannot.
READING = {
    "protocol_whitelist": "file",
    "format_whitelist": (
        "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,dv,rm,"
        "gif,apng,h264,hevc,m4v,ivf"
    ),
}
"""FFmpeg's options for files of unknown origin."""

PLAIN_FILE = "file:"
"""Prefix of a path for FFmpeg, which would take the "a" of "a:b.mp4" for a protocol."""


def open_container(path: Path) -> InputContainer:
    """Open a video file for reading. Raises PyAV's FFmpegError, which is rarely an OSError."""
    import av

    # A title that is not UTF-8 is no reason to reject a video.
    return av.open(f"{PLAIN_FILE}{path}", "r", metadata_errors="replace", options=READING)
