"""Convert videos that browsers cannot play."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apt.errors import DataError
from apt.media.containers import open_container
from apt.media.files import write_mp4


def write_playable(path: Path, video: Path) -> Path:
    """Write any video as H.264, enlarged if it is small.

    Raises:
        DataError: if the video cannot be decoded.
        InputError: if the file cannot be written.
    """
    frames, fps = read_frames(video)
    return write_mp4(path, frames, fps=fps)


def read_frames(video: Path) -> tuple[NDArray[np.uint8], float]:
    """Return all frames, uint8 (T, H, W, 3), and their rate. Raises DataError if it is damaged."""
    import av

    try:
        with open_container(video) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            return np.stack(frames), float(stream.average_rate or 24)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise DataError(f"{str(video)!r} is broken ({error}); make it again") from error
