"""Samples for raters: checked, playable in a browser, and without a trace of their origin.

Videos keep their packets but lose their metadata; .mkv files, which browsers do not play, are
encoded again. Stills become PNG, which keeps every pixel, so that the file type does not reveal the
model.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from apt.errors import DataError
from apt.files import replacing
from apt.media import write_mp4, write_png
from apt.media.containers import open_container
from apt.media.parts import VIDEO_TYPES
from apt.media.playable import read_frames, write_playable

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
STILL = ".png"
MEDIA_TYPES = {**VIDEO_TYPES, STILL: "image/png"}

_UNPLAYED = ".mkv"
_CODECS = ("h264", "vp8", "vp9", "av1")
_PIXEL_FORMATS = ("yuv420p", "yuvj420p")
"""Pixel formats that every browser decodes."""

_MIXED = 0.6
"""Share of noise in a degraded sample."""


def clean_suffix(sample: Path) -> str:
    """Return the suffix of a sample as shown to raters. Raises DataError for other file types."""
    suffix = sample.suffix.lower()
    if suffix in VIDEO_TYPES:
        return suffix
    if suffix == _UNPLAYED:
        return ".mp4"
    if suffix in IMAGE_SUFFIXES:
        return STILL
    raise DataError(
        f"{str(sample)!r} cannot be shown to raters; generate samples as one of "
        f"{', '.join([*VIDEO_TYPES, _UNPLAYED, *IMAGE_SUFFIXES])}"
    )


def write_clean(target: Path, sample: Path) -> None:
    """Write a sample for raters, after decoding every frame as a check.

    Raises:
        DataError: for a damaged file, an animated image, or a file that some browsers cannot play.
        OSError: if the file cannot be written.
        InputError: likewise, for a video that is encoded again.
    """
    if sample.suffix.lower() == _UNPLAYED:
        write_playable(target, sample)
        return
    content = _clean_video(sample) if target.suffix in VIDEO_TYPES else _clean_image(sample)
    with replacing(target) as partial:
        partial.write_bytes(content)


def write_degraded(target: Path, sample: Path, seed: int) -> None:
    """Write a sample as shuffled tiles under strong noise, which is worse by every criterion.

    Raises InputError if it cannot be written. The sample must have passed `write_clean`.
    """
    if target.suffix == STILL:
        with Image.open(sample) as image:
            frames = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
        write_png(target, degrade(frames, seed), scale=1)
    else:
        frames, fps = read_frames(sample)
        write_mp4(target, degrade(frames, seed), fps=fps, scale=1)


def degrade(frames: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Shuffle 4×4 tiles of frames (T, H, W, 3) and mix them with noise; the size stays the same."""
    random = np.random.default_rng(seed)
    rows, columns = (
        np.concatenate([parts[i] for i in random.permutation(len(parts))])
        for parts in (np.array_split(np.arange(side), 4) for side in frames.shape[1:3])
    )
    shuffled = frames[:, rows][:, :, columns].astype(np.float32)
    noise = random.integers(0, 256, frames.shape).astype(np.float32)
    return ((1 - _MIXED) * shuffled + _MIXED * noise).astype(np.uint8)


def _clean_video(sample: Path) -> bytes:
    import av

    content = io.BytesIO()
    try:
        with open_container(sample) as source:
            if not source.streams.video:
                raise DataError(f"{str(sample)!r} contains no video; generate it again")
            stream = source.streams.video[0]
            # The type stubs do not know that it is None for an unknown codec.
            context = cast("VideoCodecContext | None", stream.codec_context)
            if context is None:
                raise DataError(f"{str(sample)!r} is broken (unknown codec); generate it again")
            codec = context.codec.canonical_name
            if codec not in _CODECS:
                raise DataError(_unplayable(sample, codec))
            if context.pix_fmt not in _PIXEL_FORMATS:
                raise DataError(_unplayable(sample, f"{codec} in {context.pix_fmt}"))
            packets = [packet for packet in source.demux(stream) if packet.dts is not None]
            frames = sum(len(packet.decode()) for packet in packets)
            frames += len(context.decode(None))
            if frames == 0 or frames < stream.frames:
                raise DataError(
                    f"{str(sample)!r} is broken: {frames} of {stream.frames} frames can be "
                    "decoded; generate it again"
                )
            kind = sample.suffix.lower().removeprefix(".")
            with av.open(content, "w", format=kind) as target:
                copy = target.add_stream_from_template(stream)
                copy.metadata.clear()
                for packet in packets:
                    packet.stream = copy
                    target.mux(packet)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{str(sample)!r} is broken ({error}); generate it again") from error
    return content.getvalue()


def _clean_image(sample: Path) -> bytes:
    content = io.BytesIO()
    try:
        with Image.open(sample) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(
                    f"{str(sample)!r} is an animated image, which cannot play in sync with another "
                    "sample; generate .mp4"
                )
            ImageOps.exif_transpose(image).convert("RGB").save(content, "PNG")
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{str(sample)!r} is broken ({error}); generate it again") from error
    return content.getvalue()


def _unplayable(sample: Path, what: str) -> str:
    return f"{str(sample)!r} is {what}, which not all browsers play; encode it as H.264 in yuv420p"
