"""Write one video to one file: .mp4, .mkv, .gif, .webp or .png.

Frames are uint8 (T, H, W, 3), RGB. Frames of a few dozen pixels are too small to see, and players
blur them when they scale them up. Small frames are therefore enlarged by a whole factor first, so
that each pixel becomes a square.

Tags record in a file how it was made: prompt, seed, model and settings.

    .mp4, .mkv    title and comment of the container
    .png          text chunks: Title and Comment
    .gif          the comment
    .webp         EXIF: ImageDescription and UserComment

The title is the prompt, for people and other programs. The comment holds all tags as ASCII JSON,
so every prompt survives, whatever encoding a format or a program assumes.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from apt.device import require_memory
from apt.errors import InputError
from apt.files import replacing
from apt.media.containers import PLAIN_FILE, open_container
from apt.untrusted import parse_json

Frames = torch.Tensor | NDArray[np.uint8]

Tags = Mapping[str, Any]
"""JSON values by name; `OneStepPipeline.tags` makes them."""

COMFORTABLE_SIDE = 256
"""Frames are enlarged until their shorter side is about this many pixels."""

_BT709 = 1  # the code of BT.709 in H.264's tables of primaries and transfer functions


def auto_scale(height: int, width: int) -> int:
    """Return the whole factor that brings the shorter side near 256 pixels, at least 1."""
    return max(1, COMFORTABLE_SIDE // min(height, width))


def as_frames(frames: Frames) -> NDArray[np.uint8]:
    """Check frames and return them as a contiguous array (T, H, W, 3).

    Raises:
        InputError: if they are not uint8 of that shape with at least one pixel.
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

    The format stores colour for blocks of 2x2 pixels, so an odd height or width gains one repeated
    row or column.

    Args:
        path: file to write; its folder is created if needed.
        frames: uint8 (T, H, W, 3).
        fps: frames per second.
        scale: whole enlargement factor; None enlarges small frames (see `auto_scale`).
        tags: how the video was made; stored in the file (see `read_tags`).

    Raises:
        InputError: for frames of another shape or dtype, a frame rate out of range, tags that are
            not JSON, or a path that cannot be written.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    pixels = enlarge(as_frames(frames), scale)
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate, metadata = _frame_rate(fps), container_metadata(tags)
    with (
        _writing(path, ".mp4") as target,
        av.open(f"{PLAIN_FILE}{target}", "w", format="mp4") as container,
    ):
        container.metadata.update(metadata)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], "yuv420p"
        # Without these tags, some players assume BT.601 and some BT.709.
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
    """Write FFV1, which is lossless but not played by browsers. Takes what `write_mp4` takes."""
    import av

    pixels = enlarge(as_frames(frames), scale)
    rate, metadata = _frame_rate(fps), container_metadata(tags)
    # Leaves a random number out of the header, so equal videos give equal files.
    exact = {"fflags": "+bitexact"}
    with (
        _writing(path, ".mkv") as target,
        av.open(f"{PLAIN_FILE}{target}", "w", format="matroska", options=exact) as container,
    ):
        container.metadata.update(metadata)
        # Later versions take twice as long to start a small video.
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
    """Write a looping GIF with a palette of 256 colours per frame. Takes what `write_mp4` takes.

    GIF counts in hundredths of a second. Each frame ends at the nearest one, so errors do not add
    up. Browsers slow down GIFs of more than 50 frames per second.
    """
    array = as_frames(frames)
    height, width = array.shape[1:3]
    factor = _factor(height, width, scale)
    images = []
    for frame in array:
        # The palette is chosen before enlarging: dithering would speckle the enlarged pixels.
        palette = Image.fromarray(frame).quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
        size = (width * factor, height * factor)
        images.append(palette.resize(size, Image.Resampling.NEAREST))
    durations = _durations(len(images), fps, unit=10)
    return _write_animation(path, ".gif", images, durations, disposal=2, **gif_options(tags))


def write_webp(
    path: str | Path,
    frames: Frames,
    *,
    fps: float,
    scale: int | None = None,
    tags: Tags | None = None,
) -> Path:
    """Write a looping animated WebP. Takes what `write_mp4` takes.

    Enlarged frames are stored without loss, which makes smaller files for squares of one colour.
    Others are stored at quality 90.
    """
    array = as_frames(frames)
    pixels = enlarge(array, scale)
    images = [Image.fromarray(frame) for frame in pixels]
    options = {"lossless": pixels.shape != array.shape, "quality": 90, **webp_options(tags)}
    return _write_animation(path, ".webp", images, _durations(len(images), fps, unit=1), **options)


def write_png(
    path: str | Path, frames: Frames, *, scale: int | None = None, tags: Tags | None = None
) -> Path:
    """Write the frames side by side as one PNG, without loss. An image is a single frame."""
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
    """Write frames in the format named by the suffix of `path`, one of `SUFFIXES`.

    Raises:
        InputError: for another suffix, and for everything that the format's writer refuses.
    """
    suffix = _suffix(path)
    if suffix == ".png":
        return write_png(path, frames, scale=scale, tags=tags)
    return _ANIMATED[suffix](path, frames, fps=fps, scale=scale, tags=tags)


def check_settings(
    path: str | Path,
    size: tuple[int, int, int],
    *,
    fps: float,
    scale: int | None = None,
) -> None:
    """Raise InputError if `write_media` could not write such a video, before one is generated.

    Args:
        path: file to write; its suffix names the format.
        size: frames, height and width of the video.
        fps, scale: as for `write_media`.
    """
    suffix = _suffix(path)
    _frame_rate(fps)
    frames, height, width = size
    factor = _factor(height, width, scale)
    # A PNG holds all frames side by side.
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
"""The file suffixes that `write_media` can write."""


_LARGEST = {".mp4": 16384, ".mkv": 16384, ".gif": 65535, ".webp": 16383, ".png": 2**31 - 1}
"""The most pixels along a side that each format and its encoder allow."""

_SLOWEST = 0.01
"""Frames per second. A GIF holds a frame for 655 seconds at most."""


def _suffix(path: str | Path) -> str:
    """Return the suffix of a path in lower case. Raises InputError if it is not in `SUFFIXES`."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"cannot write {str(path)!r}: the suffix {suffix!r} is not one of {', '.join(SUFFIXES)}"
        )
    return suffix


def _factor(height: int, width: int, scale: int | None) -> int:
    """Return the enlargement factor. Raises InputError if it is below 1."""
    factor = auto_scale(height, width) if scale is None else scale
    if factor < 1:
        raise InputError(f"scale must be a whole number of at least 1, got {scale}")
    return factor


def _frame_rate(fps: float) -> Fraction:
    if not 0 < fps <= 1000:
        raise InputError(f"fps must be above 0 and at most 1000, got {fps}")
    if fps < _SLOWEST:
        raise InputError(
            f"fps must be at least {_SLOWEST}, got {fps}: files cannot show a frame for longer"
        )
    return Fraction(fps).limit_denominator(1001)


def _durations(count: int, fps: float, *, unit: int) -> list[int]:
    """Return how long each frame is shown, in milliseconds, as multiples of `unit`.

    Each frame ends at the multiple nearest to its exact end, so that errors do not add up.
    """
    rate = _frame_rate(fps)
    ends = [round(1000 * number / rate / unit) * unit for number in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _write_animation(
    path: str | Path,
    suffix: str,
    images: list[Image.Image],
    durations: list[int],
    **options: object,
) -> Path:
    with _writing(path, suffix) as target:
        images[0].save(
            target,
            format=suffix[1:].upper(),
            save_all=True,
            append_images=images[1:],
            duration=durations,
            loop=0,
            **options,
        )
    return Path(path)


@contextmanager
def _writing(path: str | Path, suffix: str) -> Iterator[Path]:
    """Yield a temporary file next to `path`, moved to `path` if the block succeeds."""
    final = Path(path)
    if final.suffix.lower() != suffix:
        raise InputError(f"the file name {str(path)!r} must end in {suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with replacing(final) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {str(path)!r}: {reason}; choose another place") from error


# --- how a file was made, inside it --------------------------------------------------------------

_OURS = "diffusion-apt"
_VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
_PICTURES = ("PNG", "GIF", "WEBP")
_DESCRIPTION, _EXIF_PART, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_IN_ASCII = b"ASCII\x00\x00\x00"


def read_tags(path: str | Path) -> dict[str, Any]:
    """Read the tags of a file, as they were given to the writer.

    Raises:
        InputError: for a file that cannot be read or has no such tags. Files of other programs have
            none, and editors and messengers remove them when they write a file again.
    """
    file = Path(path)
    comment = _comment_of_video(file) if file.suffix.lower() in _VIDEOS else _comment_of_image(file)
    try:
        found = parse_json(comment)[_OURS]
        if isinstance(found, dict):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{str(path)!r} does not say how it was made: this package did not write it, or another "
        "program has rewritten it"
    )


def container_metadata(tags: Tags | None) -> dict[str, str]:
    """Return tags as the metadata of a video container."""
    if tags is None:
        return {}
    title = _title(tags)
    return {**({"title": title} if title else {}), "comment": _comment(tags)}


def png_text(tags: Tags | None) -> PngImagePlugin.PngInfo | None:
    """Return tags as text chunks of a PNG; text outside Latin-1 becomes iTXt chunks."""
    if tags is None:
        return None
    text = PngImagePlugin.PngInfo()
    if title := _title(tags):
        text.add_text("Title", title)
    text.add_text("Comment", _comment(tags))
    return text


def gif_options(tags: Tags | None) -> dict[str, Any]:
    """Return tags as Pillow's options for GIF."""
    return {} if tags is None else {"comment": _comment(tags).encode()}


def webp_options(tags: Tags | None) -> dict[str, Any]:
    """Return tags as Pillow's options for WebP."""
    if tags is None:
        return {}
    exif = Image.Exif()
    if title := _title(tags):
        exif[_DESCRIPTION] = title.encode()
    exif.get_ifd(_EXIF_PART)[_USER_COMMENT] = _IN_ASCII + _comment(tags).encode()
    return {"exif": exif.tobytes()}


def _comment(tags: Tags) -> str:
    try:
        return json.dumps({_OURS: dict(tags)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"tags must be JSON values by name: {error}") from error


def _title(tags: Tags) -> str:
    """Return the prompt on one line; empty if the tags hold a list of prompts or none."""
    prompt = tags.get("prompt")
    if not isinstance(prompt, str):
        return ""
    printable = prompt.encode(errors="replace").decode()
    return re.sub(r"[\x00-\x1f\x7f]+", " ", printable).strip()


def _comment_of_video(file: Path) -> str:
    from av import FFmpegError

    try:
        with open_container(file) as container:
            # Matroska writes tag names in capitals.
            found = {name.lower(): text for name, text in container.metadata.items()}
            return found.get("comment", "")
    except (FFmpegError, OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _comment_of_image(file: Path) -> str:
    try:
        with Image.open(file, formats=_PICTURES) as image:
            if image.format == "WEBP":
                comment = image.getexif().get_ifd(_EXIF_PART).get(_USER_COMMENT, b"")
                comment = bytes(comment).removeprefix(_IN_ASCII)
            else:
                comment = image.info.get("Comment" if image.format == "PNG" else "comment", "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error
    return comment.decode(errors="replace") if isinstance(comment, bytes) else str(comment)


def _unreadable(file: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(
        f"cannot read {str(file)!r} ({reason}); expected a video, .png, .gif or .webp"
    )
