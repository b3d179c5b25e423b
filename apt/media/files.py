"""One generated video to one file: .mp4, .mkv, .gif, .webp or .png.

Frames are uint8 (T, H, W, 3), RGB. Frames of a few dozen pixels are unreadable on a screen, and
players smooth them; so they are enlarged by a whole factor, each pixel becoming a square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from apt.device import require_memory
from apt.errors import InputError
from apt.media.tags import Tags, container_metadata, gif_options, png_text, webp_options

Frames = torch.Tensor | NDArray[np.uint8]

COMFORTABLE_SIDE = 256
"""Frames are enlarged until their shorter side is about this many pixels."""

_BT709 = 1  # the code of BT.709 in H.264's tables of primaries and transfer functions


def auto_scale(height: int, width: int) -> int:
    """The whole factor that brings the shorter side near 256 pixels; 1 for frames above that."""
    return max(1, COMFORTABLE_SIDE // min(height, width))


def as_frames(frames: Frames) -> NDArray[np.uint8]:
    """Check frames and return them as a contiguous array (T, H, W, 3).

    Raises:
        InputError: unless they are uint8 of that shape with at least one pixel.
    """
    array = (
        frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    )
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or array.size == 0:
        raise InputError(
            f"a video to write must be uint8 of shape (frames, height, width, 3), got "
            f"{array.dtype} {array.shape}; pass one sample of the pipeline's output"
        )
    return np.ascontiguousarray(array)


def enlarge(frames: NDArray[np.uint8], scale: int | None) -> NDArray[np.uint8]:
    """Repeat each pixel of (..., H, W, 3) `scale` times both ways; None chooses `auto_scale`."""
    height, width = frames.shape[-3:-1]
    factor = _factor(height, width, scale)
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_mp4(
    path: str | Path,
    frames: Frames,
    *,
    fps: float,
    scale: int | None = None,
    tags: Tags | None = None,
) -> Path:
    """Write H.264 in yuv420p, which every browser and player can show.

    Args:
        path: its folder is created if it does not exist.
        frames: uint8 (T, H, W, 3).
        fps: frames per second.
        scale: whole enlargement factor; None chooses one for frames that are small.
        tags: how it was made, which the file then says: see `apt.media.tags`.

    The format stores colour for blocks of 2x2 pixels, so an odd height or width gains one repeated
    row or column.

    Raises:
        InputError: for other frames, a rate that is not positive, tags that JSON does not hold, or
            a path that cannot be written.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    pixels = enlarge(as_frames(frames), scale)
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate, metadata = _frame_rate(fps), container_metadata(tags)
    with _writing(path, ".mp4") as target, av.open(str(target), "w", format="mp4") as container:
        container.metadata.update(metadata)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], "yuv420p"
        # Untagged colour is read as BT.601 or BT.709 by the player's taste.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.color_primaries = _BT709
        stream.codec_context.color_trc = _BT709
        for image in pixels:
            rgb = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def write_mkv(
    path: str | Path,
    frames: Frames,
    *,
    fps: float,
    scale: int | None = None,
    tags: Tags | None = None,
) -> Path:
    """Write FFV1, which loses nothing and which browsers do not play. Arguments as `write_mp4`."""
    import av

    pixels = enlarge(as_frames(frames), scale)
    rate, metadata = _frame_rate(fps), container_metadata(tags)
    # Without a random number in the header, so that equal videos are equal files.
    exact = {"fflags": "+bitexact"}
    with (
        _writing(path, ".mkv") as target,
        av.open(str(target), "w", format="matroska", options=exact) as container,
    ):
        container.metadata.update(metadata)
        # Version 1, since later ones take twice as long to begin a small video.
        stream = container.add_stream("ffv1", rate=rate, options={"level": "1"})
        stream.codec_context.thread_count = 1
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], "bgr0"
        for image in pixels:
            rgb = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(rgb.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return Path(path)


def write_gif(
    path: str | Path,
    frames: Frames,
    *,
    fps: float,
    scale: int | None = None,
    tags: Tags | None = None,
) -> Path:
    """Write a looping GIF with a palette of 256 colours per frame. Arguments as `write_mp4`.

    GIF counts in hundredths of a second, so the rate is met to that precision.
    """
    array = as_frames(frames)
    images = []
    for frame in array:
        # The palette is chosen before enlarging, or dithering would speckle the enlarged pixels.
        palette = Image.fromarray(frame).quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
        factor = enlarge(frame, scale).shape[0] // frame.shape[0]
        size = (frame.shape[1] * factor, frame.shape[0] * factor)
        images.append(palette.resize(size, Image.Resampling.NEAREST))
    return _write_animation(path, ".gif", images, fps, disposal=2, **gif_options(tags))


def write_webp(
    path: str | Path,
    frames: Frames,
    *,
    fps: float,
    scale: int | None = None,
    tags: Tags | None = None,
) -> Path:
    """Write a looping animated WebP. Arguments as `write_mp4`.

    Enlarged frames are stored without loss, which is smaller for squares of one colour; others at
    quality 90.
    """
    array = as_frames(frames)
    pixels = enlarge(array, scale)
    images = [Image.fromarray(frame) for frame in pixels]
    lossless = pixels.shape != array.shape
    options = webp_options(tags)
    return _write_animation(path, ".webp", images, fps, lossless=lossless, quality=90, **options)


def write_png(
    path: str | Path, frames: Frames, *, scale: int | None = None, tags: Tags | None = None
) -> Path:
    """Write the frames side by side as one PNG (an image is a single frame), without loss."""
    strip = np.concatenate(list(enlarge(as_frames(frames), scale)), axis=1)
    text = png_text(tags)
    with _writing(path, ".png") as target:
        Image.fromarray(strip).save(target, format="PNG", optimize=True, pnginfo=text)
    return Path(path)


def write_media(
    path: str | Path,
    frames: Frames,
    *,
    fps: float,
    scale: int | None = None,
    tags: Tags | None = None,
) -> Path:
    """Write frames in the format that the suffix of `path` names: one of `SUFFIXES`.

    Raises:
        InputError: for another suffix, and as the writer of that format does.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        return write_png(path, frames, scale=scale, tags=tags)
    if suffix not in _ANIMATED:
        raise InputError(
            f"cannot write {str(path)!r}: the suffix {suffix!r} is not one of {', '.join(SUFFIXES)}"
        )
    return _ANIMATED[suffix](path, frames, fps=fps, scale=scale, tags=tags)


def check_settings(
    path: str | Path,
    size: tuple[int, int, int],
    *,
    fps: float,
    scale: int | None = None,
) -> None:
    """Raise InputError for what `write_media` could not write, before there is anything to write.

    Args:
        path: whose suffix names the format.
        size: frames, height and width of the video.
        fps, scale: as for `write_media`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"cannot write {str(path)!r}: the suffix {suffix!r} is not one of {', '.join(SUFFIXES)}"
        )
    _frame_rate(fps)
    frames, height, width = size
    factor = _factor(height, width, scale)
    # A picture has its frames side by side.
    sides = (height * factor, width * factor * (frames if suffix == ".png" else 1))
    if max(sides) > _LARGEST[suffix]:
        raise InputError(
            f"{suffix} holds at most {_LARGEST[suffix]} pixels a side, and this would be "
            f"{sides[0]}x{sides[1]} (height x width) at scale {factor}; choose a smaller scale, or "
            "another format"
        )
    require_memory(
        3 * frames * height * width * factor**2,
        torch.device("cpu"),
        f"a video of {frames} frames of {height * factor}x{width * factor} (height x width)",
        "choose a smaller scale or size",
    )


_ANIMATED = {".mp4": write_mp4, ".mkv": write_mkv, ".gif": write_gif, ".webp": write_webp}
SUFFIXES = (*_ANIMATED, ".png")
"""The file name endings that `write_media` understands."""


_LARGEST = {".mp4": 16384, ".mkv": 16384, ".gif": 65535, ".webp": 16383, ".png": 2**31 - 1}
"""Pixels along a side that the formats, and the encoders here, hold."""


def _factor(height: int, width: int, scale: int | None) -> int:
    """The factor of enlargement. Raises InputError for one below 1."""
    factor = auto_scale(height, width) if scale is None else scale
    if factor < 1:
        raise InputError(f"scale must be a whole number of at least 1, got {scale}")
    return factor


def _frame_rate(fps: float) -> Fraction:
    if not 0 < fps <= 1000:
        raise InputError(f"fps must be above 0 and at most 1000, got {fps}")
    return Fraction(fps).limit_denominator(1001)


def _write_animation(
    path: str | Path, suffix: str, images: list[Image.Image], fps: float, **options: object
) -> Path:
    duration = round(1000 / _frame_rate(fps))
    with _writing(path, suffix) as target:
        images[0].save(
            target,
            format=suffix[1:].upper(),
            save_all=True,
            append_images=images[1:],
            duration=duration,
            loop=0,
            **options,
        )
    return Path(path)


@contextmanager
def _writing(path: str | Path, suffix: str) -> Iterator[Path]:
    """Yield a file beside `path` that takes its place when the block ends well."""
    final = Path(path)
    if final.suffix.lower() != suffix:
        raise InputError(f"the file name {str(path)!r} must end in {suffix}")
    partial = final.with_name(f".{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {str(path)!r}: {reason}; choose another place") from error
