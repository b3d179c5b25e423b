"""Writing a data set as a folder of videos, for viewing and for training from files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from apt.data.dataset import Sample
from apt.data.decode import read_clip
from apt.data.folder import exact_rate
from apt.data.metadata import METADATA_NAMES, read_metadata
from apt.errors import ConfigError, DataError
from apt.pixels import to_uint8

if TYPE_CHECKING:
    from av.video.stream import VideoStream

_SAME_PICTURE = 8 / 255
"""Limit of the mean absolute difference between a file's pixels in [-1, 1] and its clip's."""


class Clips(Protocol):
    """Clips by index, as they can be written."""

    def __getitem__(self, index: int, /) -> Sample: ...


def write_video_folder(
    dataset: Clips,
    directory: str | Path,
    num: int,
    fps: float | Fraction,
    *,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write samples 0 to num - 1 as H.264 `.mp4` files with a `metadata.csv`.

    Frames are stored as lossless H.264 (x264 at crf 0) with full-resolution colour (yuv444p), so
    the only error is the rounding of RGB to 8-bit YCbCr. On noisy 32x32 clips that is 52 dB PSNR
    (an error of 0.005 in [-1, 1], a twentieth of the σ = 0.1 by which APT perturbs real videos), so
    training from the files equals training from the samples. The usual yuv420p would store colour
    at 16x16 and reach 26 dB; crf 4 reaches 43 dB with two thirds of the bytes.

    Files are written atomically, so an interrupted call can be repeated: files that already hold
    their clip are kept.

    Args:
        dataset: source of the samples.
        directory: created if missing.
        num: number of files.
        fps: frames per second to store.
        progress: called with the number of finished files after each file.

    Returns:
        The directory.

    Raises:
        ConfigError: if `num` or `fps` is not positive.
        DataError: if the directory holds other videos with these names or cannot be written.
    """
    from av.error import FFmpegError

    if num < 1 or not fps > 0:
        raise ConfigError(f"num and fps must be positive, got {num} and {fps}")
    root, rate = Path(directory), exact_rate(fps)
    metadata = root / METADATA_NAMES[0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        written = _captions(metadata)
        names = {f"{index:06d}.mp4" for index in range(num)}
        if not written.keys() <= names:
            raise DataError(_foreign(root, f"{metadata.name} names {min(written.keys() - names)}"))
        captions = {}
        for index in range(num):
            name = f"{index:06d}.mp4"
            sample = dataset[index]
            if written.get(name, sample.caption.strip()) != sample.caption.strip():
                raise DataError(_foreign(root, f"{name} has the caption {written[name]!r}"))
            if not _holds(root / name, sample.pixels, rate):
                _replace(root / name, encode_video(sample.pixels, rate))
            captions[name] = sample.caption
            if progress:
                progress(index + 1)
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerows([("file_name", "caption"), *captions.items()])
        _replace(metadata, table.getvalue().encode())
    except (OSError, FFmpegError) as error:
        raise DataError(
            f"{root}: cannot be written: {error}; choose another folder, or free some space"
        ) from error
    return root


def encode_video(pixels: Tensor, fps: Fraction) -> bytes:
    """Encode a clip (3, T, H, W) in [-1, 1] as the bytes of an `.mp4`; see `write_video_folder`."""
    import av
    from av.video.frame import VideoFrame
    from av.video.reformatter import ColorRange, Colorspace

    frames = to_uint8(pixels).permute(1, 2, 3, 0)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": "0", "preset": "medium"}
        stream = cast("VideoStream", container.add_stream("libx264", rate=fps, options=options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        # Readers would assume these colours for untagged files of this size; state them anyway.
        stream.codec_context.colorspace = Colorspace.ITU601
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.thread_count = 1
        for frame in frames.numpy():
            converted = VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv444p",
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(converted))
        container.mux(stream.encode())
    return file.getvalue()


def _captions(metadata: Path) -> dict[str, str]:
    """Read the captions that an earlier, complete call wrote; empty if there was none."""
    if not metadata.is_file():
        return {}
    rows = read_metadata(metadata)
    bad = next((row for row in rows if row.problem), None)
    if bad:
        raise DataError(_foreign(metadata.parent, f"{bad.where}: {bad.problem}"))
    return {row.file_name or "": row.caption for row in rows}


def _holds(path: Path, pixels: Tensor, fps: Fraction) -> bool:
    """Return whether the file holds this clip, or False if it must be written (again).

    Raises DataError if it holds another clip.
    """
    if not path.is_file():
        return False
    try:
        stored = read_clip(path, start=Fraction(0), num_frames=pixels.shape[1], fps=fps)
    except DataError:
        return False
    same = stored.shape == pixels.shape and (stored - pixels).abs().mean() < _SAME_PICTURE
    if not same:
        raise DataError(_foreign(path.parent, f"{path.name} shows another clip"))
    return True


def _foreign(root: Path, found: str) -> str:
    return f"{root}: already holds other videos ({found}); choose an empty folder or remove them"


def _replace(path: Path, content: bytes) -> None:
    """Write a file atomically: after an interruption, it is either complete or unchanged."""
    # Hidden, so that a leftover is not taken for a sample of the folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
