"""Video files through FFmpeg: a name is that of a file, and its content leads to no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.container import InputContainer

# A playlist can name any file and address, whatever its own name; media files cannot.
READING = {
    "protocol_whitelist": "file",
    "format_whitelist": (
        "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,dv,rm,"
        "gif,apng,h264,hevc,m4v,ivf"
    ),
}
"""FFmpeg's options for files that others made."""

PLAIN_FILE = "file:"
"""Prefix of a path for FFmpeg, which otherwise takes part of a name such as "a:b.mp4" for a
protocol."""


def open_container(path: Path) -> InputContainer:
    """A video file to read. Raises what PyAV does: FFmpegError, of which few are OSErrors."""
    import av

    # Foreign bytes in a title are no reason to refuse a video.
    return av.open(f"{PLAIN_FILE}{path}", "r", metadata_errors="replace", options=READING)
