"""What a video or picture says that it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


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
