"""One generated video to one file: .mp4, .gif, .webp or .png.

Frames are uint8 (T, H, W, 3), RGB. Frames of a few dozen pixels are unreadable on a screen, and
players smooth them; so they are enlarged by a whole factor, each pixel becoming a square.

A file says inside how it was made: prompt, seed, model and settings.

    .mp4     title and comment of the container
    .png     text chunks: Title and Comment
    .gif     the comment
    .webp    EXIF: ImageDescription and UserComment

The title is the prompt, for people and other programs. The comment is all of it, as JSON in ASCII,
so that every prompt comes back as it was whatever a format or a program takes comments for.
"""

from __future__ import annotations

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
from apt.untrusted import parse_json

Frames = torch.Tensor | NDArray[np.uint8]

Tags = Mapping[str, Any]
"""What JSON holds, by name; `OneStepPipeline.tags` makes them."""

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
        tags: how it was made, which the file then says: see `read_tags`.

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


_ANIMATED = {".mp4": write_mp4, ".gif": write_gif, ".webp": write_webp}
SUFFIXES = (*_ANIMATED, ".png")
"""The file name endings that `write_media` understands."""


_LARGEST = {".mp4": 16384, ".gif": 65535, ".webp": 16383, ".png": 2**31 - 1}
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


# --- how a file was made, inside it --------------------------------------------------------------

_OURS = "diffusion-apt"
_VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
_PICTURES = ("PNG", "GIF", "WEBP")
_DESCRIPTION, _EXIF_PART, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_IN_ASCII = b"ASCII\x00\x00\x00"


def read_tags(path: str | Path) -> dict[str, Any]:
    """What a file says of how it was made, as it was given to the writer.

    Raises:
        InputError: for a file that cannot be read, or that says nothing, as most files of other
            programs and those that were written anew by an editor or a messenger.
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
        f"{str(path)!r} does not say how it was made: it is not of this package, or another "
        "program has written it anew"
    )


def container_metadata(tags: Tags | None) -> dict[str, str]:
    """As a video's container holds them."""
    if tags is None:
        return {}
    title = _title(tags)
    return {**({"title": title} if title else {}), "comment": _comment(tags)}


def png_text(tags: Tags | None) -> PngImagePlugin.PngInfo | None:
    """As a PNG's text chunks; those that are not Latin-1 become international ones."""
    if tags is None:
        return None
    text = PngImagePlugin.PngInfo()
    if title := _title(tags):
        text.add_text("Title", title)
    text.add_text("Comment", _comment(tags))
    return text


def gif_options(tags: Tags | None) -> dict[str, Any]:
    """As an option of Pillow's for GIF."""
    return {} if tags is None else {"comment": _comment(tags).encode()}


def webp_options(tags: Tags | None) -> dict[str, Any]:
    """As an option of Pillow's for WebP."""
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
        raise InputError(f"tags must be what JSON holds, by name: {error}") from error


def _title(tags: Tags) -> str:
    """A prompt on one line; nothing for several."""
    prompt = tags.get("prompt")
    if not isinstance(prompt, str):
        return ""
    printable = prompt.encode(errors="replace").decode()
    return re.sub(r"[\x00-\x1f\x7f]+", " ", printable).strip()


def _comment_of_video(file: Path) -> str:
    import av

    try:
        with av.open(str(file)) as container:
            return container.metadata.get("comment", "")
    except (OSError, ValueError) as error:
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
        f"cannot read {str(file)!r} ({reason}); expected a video, or a .png, .gif or .webp"
    )
