"""The choice of clips for a folder: a size, length and frame rate that suit most of its files."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from apt.data.buckets import ASPECT_RATIOS, Bucket, best_bucket, make_buckets, round_to
from apt.data.folder import exact_rate, look_at
from apt.data.reading import Entry, MediaInfo
from apt.data.report import problem_lines
from apt.data.scan import Scan, scan_folder
from apt.errors import DataError, counted

__all__ = [
    "ClipSize",
    "FolderStatistics",
    "choose_clip",
    "choose_prompts",
    "read_captions",
    "read_statistics",
]

MOST = 0.9
"""The fraction of files that a choice must suit, so that a few odd files do not decide for all."""

MAX_FPS = 30
"""Above it, every second (third, ...) frame is used: a clip of few frames would show no motion."""

_DISTINCT_SIZES = 400


@dataclass(frozen=True)
class ClipSize:
    """Frames, height and width in pixels, and frames per second; 0 keeps each video's own rate."""

    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class FolderStatistics:
    """The files of a folder that can be read.

    Attributes:
        directory: the folder.
        videos, images: properties of each file, by name.
        captions: in the order of the files' names.
    """

    directory: Path
    videos: list[MediaInfo]
    images: list[MediaInfo]
    captions: list[str]

    def words(self) -> str:
        """Return the counts in words, such as "40 videos and 3 images"."""
        counts = {"video": len(self.videos), "image": len(self.images)}
        named = [f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in counts.items() if n]
        return " and ".join(named)


def read_statistics(
    directory: str | Path, *, captioned: bool = True, scan: Callable[..., Scan] = scan_folder
) -> FolderStatistics:
    """Read the headers of a folder's files.

    Args:
        directory: the folder; see `apt.data.scan`.
        captioned: use only files with a caption.
        scan: finds the files, as `apt.data.scan.scan_folder` does.

    Raises:
        DataError: if there is no such folder, or nothing usable in it.
    """
    found = scan(directory, captioned=captioned)
    captions: dict[Hashable, list[str]] = {}
    for entry in found.entries:
        captions.setdefault(entry.place, []).append(entry.caption)
    files = {entry.place: entry for entry in found.entries}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        infos = dict(zip(files, pool.map(_look, files.values()), strict=True))
    read = {place: info for place, info in infos.items() if info is not None}
    if not read:
        raise DataError(_nothing(found, len(infos)))
    return FolderStatistics(
        directory=found.directory,
        videos=[info for info in read.values() if not info.is_image],
        images=[info for info in read.values() if info.is_image],
        captions=[caption for place in read for caption in captions[place]],
    )


def read_captions(directory: str | Path, *, scan: Callable[..., Scan] = scan_folder) -> list[str]:
    """Read the captions in a folder in the order of the files, without opening the files.

    Raises DataError if there are none, or no such folder.
    """
    found = scan(directory)
    if not found.entries:
        raise DataError(_nothing(found, 0))
    return [entry.caption for entry in found.entries]


def choose_clip(
    found: FolderStatistics,
    *,
    multiple: int,
    max_frames: int,
    max_pixels: int,
    frame_step: int = 4,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    native_ratio: bool = True,
) -> ClipSize:
    """Choose clips that suit at least nine in ten videos of a folder, or images if it has no video.

    The rate is the highest that these videos all reach, so that no frame is repeated, and the
    length is the longest that they all reach. The size is the one that keeps most of the most
    common shape without enlarging any of these files.

    Args:
        found: the folder's contents.
        multiple: of heights and widths.
        max_frames: maximum number of frames.
        max_pixels: maximum of height times width.
        frame_step: clips with motion have a multiple of this many frames after the first. It must
            be a multiple of 4.
        frames, height, width, fps: values that are already decided; None are chosen.
        native_ratio: clips keep shapes near their own, and height times width is a pixel budget.

    Raises:
        DataError: if more than half of the videos are too short for motion, or of the files too
            small.
    """
    videos = found.videos
    if fps is None or not videos:
        fps = _rate([info.fps for info in videos]) if videos else 0.0
    if frames is None:
        frames = _frames(found, fps, max_frames, frame_step) if videos else 1
    sizes = Counter((info.height, info.width) for info in videos or found.images)
    if height is None or width is None:
        height, width = _size(found, sizes, multiple, max_pixels, height, width, native_ratio)
    return ClipSize(frames, height, width, float(fps))


def choose_prompts(
    captions: Sequence[str], count: int, usable: Callable[[str], bool] = bool
) -> tuple[str, ...]:
    """Choose up to `count` distinct captions, spread over a folder and always the same.

    Args:
        captions: in the order of the files.
        count: maximum number.
        usable: returns whether the text encoder accepts a caption.
    """
    distinct = [caption for caption in dict.fromkeys(captions) if usable(caption)]
    if len(distinct) <= count:
        return tuple(distinct)
    # The middles of `count` equal stretches, because neighbouring files are often of one scene.
    return tuple(distinct[(2 * i + 1) * len(distinct) // (2 * count)] for i in range(count))


def _look(entry: Entry) -> MediaInfo | None:
    try:
        return look_at(entry)
    except DataError:
        return None  # the data set reports it, with the reason


def _nothing(scan: Scan, unreadable: int) -> str:
    found = problem_lines(scan.problems)
    if unreadable:
        found.append(
            f"  {counted(unreadable, 'file')} that cannot be read (`diffusion-apt data check`)"
        )
    return "\n".join(
        [
            f"{scan.directory}: nothing usable; looked for {scan.looked_for}. Found:",
            *(found or ["  no such files"]),
        ]
    )


def _rate(rates: Sequence[Fraction]) -> float:
    """Return the highest rate that most videos reach."""
    needed = MOST * len(rates)
    counts = Counter(rates)

    def at_least(rate: Fraction) -> int:
        # Rates up to 1% lower count as equal: 23.976 is 24.
        return sum(n for other, n in counts.items() if other >= rate * Fraction(99, 100))

    best = max(rate for rate in counts if at_least(rate) >= needed)
    return float(best / math.ceil(best / MAX_FPS))


def _frames(found: FolderStatistics, fps: float, max_frames: int, step: int) -> int:
    """Return the longest step * k + 1 that most videos reach at a rate."""
    rate = exact_rate(fps) if fps else None
    lengths = sorted(info.clip_frames(rate or info.fps) for info in found.videos)
    reached = lengths[math.floor((1 - MOST) * len(lengths))]
    frames = (min(reached, max_frames) - 1) // step * step + 1
    shortest = step + 1
    if frames >= shortest or max_frames < shortest:
        return max(frames, 1)
    short = sum(length < shortest for length in lengths)
    if 2 * short > len(lengths):
        raise DataError(
            f"{found.directory}: {short} of {len(lengths)} videos have fewer than {shortest} "
            f"frames at {fps:g} fps, too short for clips with motion; use longer videos, a higher "
            "--data.fps, or single frames with --data.frames 1"
        )
    return shortest


def _size(
    found: FolderStatistics,
    sizes: Counter[tuple[int, int]],
    multiple: int,
    max_pixels: int,
    height: int | None,
    width: int | None,
    native_ratio: bool,
) -> tuple[int, int]:
    """Return the largest (height, width) of the most common shape that most files reach."""
    shape = _common_shape(sizes)
    sample = _thinned(sizes)
    total = sum(sample.values())
    suited: dict[tuple[int, int], int] = {}
    for h, w in _candidates(shape, multiple, max_pixels, height, width):
        many = native_ratio and h * w >= multiple**2
        buckets = make_buckets(h * w, multiple) if many else [Bucket(1, h, w)]
        suited[h, w] = sum(
            number
            for (own_height, own_width), number in sample.items()
            if best_bucket(buckets, frames=1, height=own_height, width=own_width, max_upscale=1)
        )
    fitting = [size for size, number in suited.items() if number >= MOST * total]
    best = fitting[-1] if fitting else max(suited, key=lambda size: suited[size])
    if 2 * suited[best] < total:
        small = max(sizes.items(), key=lambda item: item[1])[0]
        raise DataError(
            f"{found.directory}: most files, such as those of {small[1]}x{small[0]} pixels, are "
            f"smaller than the smallest clip size, {best[1]}x{best[0]}; use larger files, or a "
            "codec or model with a smaller --data.size-multiple"
        )
    return best


def _candidates(
    shape: float, multiple: int, max_pixels: int, height: int | None, width: int | None
) -> list[tuple[int, int]]:
    """Return sizes near a shape (width over height), sorted by how much of it they keep."""

    if height is not None:
        return [(height, round_to(height * shape, multiple))]
    if width is not None:
        return [(round_to(width / shape, multiple), width)]
    steps = range(multiple, max(multiple, math.ceil(math.sqrt(max_pixels) * 3)) + 1, multiple)
    both = {(round_to(side / shape, multiple), side) for side in steps}
    both |= {(side, round_to(side * shape, multiple)) for side in steps}
    fitting = [size for size in both if size[0] * size[1] <= max_pixels]

    def kept(size: tuple[int, int]) -> float:
        ratio = size[1] / size[0] / shape
        return size[0] * size[1] * min(ratio, 1 / ratio)

    return sorted(fitting or [(multiple, multiple)], key=lambda size: (kept(size), size))


def _common_shape(sizes: Counter[tuple[int, int]]) -> float:
    """Return the usual width over height: the median of files near the most common format."""
    near: dict[Fraction, list[float]] = {}
    for (height, width), number in sizes.items():
        shape = width / height
        ratio = min(ASPECT_RATIOS, key=lambda r: abs(math.log(shape / r)))
        near.setdefault(ratio, []).extend([shape] * number)
    # Among equals, the first in the order of the formats.
    common = max(ASPECT_RATIOS, key=lambda r: len(near.get(r, ())))
    shapes = sorted(near[common])
    return shapes[len(shapes) // 2]


def _thinned(sizes: Counter[tuple[int, int]]) -> Counter[tuple[int, int]]:
    """Sample the sizes evenly by area, because each photograph can have its own size."""
    if len(sizes) <= _DISTINCT_SIZES:
        return sizes
    ordered = sorted(sizes.elements(), key=lambda size: (size[0] * size[1], size))
    step = len(ordered) / _DISTINCT_SIZES
    return Counter(ordered[int((i + 0.5) * step)] for i in range(_DISTINCT_SIZES))
