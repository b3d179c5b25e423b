"""Aspect-ratio buckets: a few sizes that keep clips near their native resolution and shape.

The paper trains on images and videos "at their native resolutions" (APT section 3; NaViT). A batch
needs one shape, so every clip is resized without distortion and centre-cropped to the size that
keeps most of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

from apt.errors import ConfigError

ASPECT_RATIOS: tuple[Fraction, ...] = tuple(
    Fraction(width, height)
    for width, height in (
        (1, 1), (5, 4), (4, 5), (4, 3), (3, 4), (3, 2), (2, 3),
        (16, 9), (9, 16), (2, 1), (1, 2), (21, 9), (9, 21),
    )
)  # fmt: skip
"""Width divided by height, for the formats of cameras and screens."""

MAX_UPSCALE = 1.1
"""The most that a clip is enlarged to a bucket; beyond it, clips would only teach blur."""


class Bucket(NamedTuple):
    """A clip size: frames (4k + 1), height and width in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def check_size(
    frames: int, height: int, width: int, *, multiple: int, frame_step: int, prefix: str = ""
) -> None:
    """Raise ConfigError for a clip size that no model of these latents could generate.

    Such clips would be cropped to another size than requested.

    Args:
        frames, height, width: of the clip.
        multiple: of heights and widths, as for `make_buckets`.
        frame_step: the number of frames after the first must be a multiple of this.
        prefix: of the options' names, such as "data.".
    """
    for name, asked in (("height", height), ("width", width)):
        below = asked // multiple * multiple
        if asked != below:
            near = " or ".join(str(size) for size in (below, below + multiple) if size > 0)
            raise ConfigError(
                f"{prefix}{name} must be a multiple of {multiple}, one latent of the codec times "
                f"the patch of the model, got {asked}; set --{prefix}{name} {near}"
            )
    if (frames - 1) % frame_step:
        below = (frames - 1) // frame_step * frame_step + 1
        raise ConfigError(
            f"{prefix}frames must be {frame_step}k + 1, got {frames}; set --{prefix}frames {below} "
            f"or {below + frame_step}"
        )


def make_buckets(
    max_pixels: int,
    multiple: int,
    *,
    frames: Iterable[int] = (1,),
    aspect_ratios: Iterable[Fraction] = ASPECT_RATIOS,
    levels: int = 1,
) -> list[Bucket]:
    """Return sizes of at most `max_pixels` per frame, for each aspect ratio and number of frames.

    Args:
        max_pixels: height times width of the largest frames, e.g. 1280 * 720.
        multiple: heights and widths are multiples of this (codec times patch size).
        frames: numbers of frames, each 4k + 1; 1 is for images.
        aspect_ratios: width divided by height.
        levels: 2, 3, ... adds sizes with a half, a quarter, ... of the pixels, for sources that
            are smaller than the budget.

    Returns:
        Distinct buckets, sorted. Rounding may put an area above its level's, but never above
        `max_pixels`.

    Raises:
        ConfigError: if a number is out of range, or the budget is below one `multiple` squared.
    """
    if multiple < 1 or levels < 1 or max_pixels < multiple**2:
        raise ConfigError(
            f"buckets need multiple >= 1, levels >= 1 and max_pixels >= multiple squared, got "
            f"multiple {multiple}, levels {levels}, max_pixels {max_pixels}"
        )
    sizes = set()
    for level in range(levels):
        pixels = max_pixels / 2**level
        for ratio in aspect_ratios:
            height = round_to(math.sqrt(pixels / ratio), multiple)
            width = round_to(math.sqrt(pixels * ratio), multiple)
            while height * width > max_pixels:
                # Shrink the side that leaves the shape nearer to the ratio.
                shorter = abs(math.log(width / max(height - multiple, 1) / ratio))
                narrower = abs(math.log(max(width - multiple, 1) / height / ratio))
                if width == multiple or (height > multiple and shorter < narrower):
                    height -= multiple
                else:
                    width -= multiple
            sizes.add((height, width))
    return check_buckets(sorted(Bucket(t, h, w) for t in set(frames) for h, w in sizes))


def check_buckets(buckets: Iterable[Sequence[int]]) -> list[Bucket]:
    """Return sizes as distinct buckets, in the given order.

    Raises:
        ConfigError: if there are none, a size is not positive, or its frames are not 4k + 1.
    """
    checked = list(dict.fromkeys(Bucket(*bucket) for bucket in buckets))
    if not checked:
        raise ConfigError("no buckets given: pass at least one (frames, height, width)")
    for bucket in checked:
        if min(bucket) < 1 or bucket.frames % 4 != 1:
            below = max(1, (bucket.frames - 1) // 4 * 4 + 1)
            raise ConfigError(
                f"bucket {bucket} is invalid: sizes must be positive and frames 4k + 1, for "
                f"example {below} or {below + 4}"
            )
    return checked


def best_bucket(
    buckets: Iterable[Bucket],
    *,
    frames: int,
    height: int,
    width: int,
    max_upscale: float = MAX_UPSCALE,
) -> Bucket | None:
    """Return the bucket that keeps most of a source.

    A bucket keeps its volume (T * H * W) times the fraction of the picture that remains after the
    centre crop. Buckets that are longer than the source, or would enlarge a side by more than
    `max_upscale`, are skipped. Among equals the first one is returned.

    Args:
        buckets: candidates.
        frames: frames of the source at the wanted frame rate.
        height, width: the source's display size in pixels.
        max_upscale: 1 forbids enlarging, `math.inf` allows any.

    Returns:
        One of `buckets`, or None if none fits.
    """
    best, most = None, 0.0
    for bucket in buckets:
        scale = max(bucket.height / height, bucket.width / width)
        if bucket.frames > frames or scale > max_upscale:
            continue
        # A single division of integers, so that equal amounts compare as equal.
        sides = (bucket.height * width, bucket.width * height)
        amount = math.prod(bucket) * min(sides) / max(sides)
        if amount > most:
            best, most = bucket, amount
    return best


def round_to(value: float, multiple: int) -> int:
    """Return the nearest multiple, at least one times `multiple`."""
    return max(multiple, round(value / multiple) * multiple)
