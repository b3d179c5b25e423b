"""Samples as a rater gets them: checked, playable in a browser, and saying nothing of their origin.

Videos keep their packets and lose their metadata; those in .mkv, which browsers do not play, are
encoded anew. Stills become PNG, which loses none of their pixels, so that the kind of a file does
not tell models apart.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from apt.errors import DataError
from apt.files import replacing
from apt.media import write_mp4, write_png
from apt.media.playable import read_frames, write_playable

VIDEO_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
STILL = ".png"
MEDIA_TYPES = {**VIDEO_TYPES, STILL: "image/png"}

_UNPLAYED = ".mkv"
_CODECS = ("h264", "vp8", "vp9", "av1")
_PIXEL_FORMATS = ("yuv420p", "yuvj420p")
"""What every browser decodes."""

_MIXED = 0.6
"""Share of noise in a degraded sample."""


def clean_suffix(sample: Path) -> str:
    """The suffix of a sample as it is shown. Raises DataError for other kinds of files."""
    suffix = sample.suffix.lower()
    if suffix in VIDEO_TYPES:
        return suffix
    if suffix == _UNPLAYED:
        return ".mp4"
    if suffix in IMAGE_SUFFIXES:
        return STILL
    raise DataError(
        f"{str(sample)!r} cannot be shown to raters: a sample is "
        f"{', '.join([*VIDEO_TYPES, _UNPLAYED, *IMAGE_SUFFIXES])}; generate with such an ending"
    )


def write_clean(target: Path, sample: Path) -> None:
    """Write a sample for raters, after every frame was decoded.

    Raises:
        DataError: a file that is damaged, moves although it is no video, or that browsers do not
            play.
        OSError: the disk refuses; InputError, where a video is encoded anew.
    """
    if sample.suffix.lower() == _UNPLAYED:
        write_playable(target, sample)
        return
    content = _clean_video(sample) if target.suffix in VIDEO_TYPES else _clean_image(sample)
    with replacing(target) as partial:
        partial.write_bytes(content)


def write_degraded(target: Path, sample: Path, seed: int) -> None:
    """Write a sample whose places are shuffled and drowned in noise: worse by every criterion.

    Raises InputError if it cannot be written; DataError as `write_clean`.
    """
    if target.suffix == STILL:
        with Image.open(sample) as image:
            frames = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
        write_png(target, degrade(frames, seed), scale=1)
    else:
        frames, fps = read_frames(sample)
        write_mp4(target, degrade(frames, seed), fps=fps, scale=1)


def degrade(frames: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) in 4×4 tiles that changed places, mixed with noise; the same size."""
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
        with av.open(str(sample)) as source:
            if not source.streams.video:
                raise DataError(f"{str(sample)!r} has no video in it; make it again")
            stream = source.streams.video[0]
            context = stream.codec_context
            if context.name not in (*_CODECS, *(f"lib{name}" for name in _CODECS), "libdav1d"):
                raise DataError(_unplayable(sample, context.name))
            if context.pix_fmt not in _PIXEL_FORMATS:
                raise DataError(_unplayable(sample, f"{context.name} in {context.pix_fmt}"))
            packets = [packet for packet in source.demux(stream) if packet.dts is not None]
            frames = sum(len(packet.decode()) for packet in packets)
            frames += len(context.decode(None))
            if frames == 0 or frames < stream.frames:
                raise DataError(
                    f"{str(sample)!r} is broken: {frames} of {stream.frames} frames can be "
                    "decoded; make it again"
                )
            kind = sample.suffix.lower().removeprefix(".")
            with av.open(content, "w", format=kind) as target:
                copy = target.add_stream_from_template(stream)
                copy.metadata.clear()
                for packet in packets:
                    packet.stream = copy
                    target.mux(packet)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{str(sample)!r} is broken ({error}); make it again") from error
    return content.getvalue()


def _clean_image(sample: Path) -> bytes:
    content = io.BytesIO()
    try:
        with Image.open(sample) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(
                    f"{str(sample)!r} moves, and is no video, so it could not play in step with "
                    "another; generate .mp4"
                )
            ImageOps.exif_transpose(image).convert("RGB").save(content, "PNG")
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{str(sample)!r} is broken ({error}); make it again") from error
    return content.getvalue()


def _unplayable(sample: Path, what: str) -> str:
    return (
        f"{str(sample)!r} is {what}, which browsers do not all play; encode it as H.264 in yuv420p"
    )
