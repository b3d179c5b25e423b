"""Real files for the tests, written with PyAV and Pillow."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("av")

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

LEVEL_STEP = 3


def numbered(num: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames (num, H, W, 3), frame i in the grey 3 * i: a decoded frame tells its own number."""
    levels = np.arange(num, dtype=np.uint8) * LEVEL_STEP
    return np.broadcast_to(levels[:, None, None, None], (num, height, width, 3)).copy()


def numbers(pixels: np.ndarray) -> list[int]:
    """The numbers of decoded frames (3, T, H, W) in [-1, 1] that `numbered` made."""
    levels = (np.asarray(pixels) + 1) * 127.5
    return np.round(levels.mean(axis=(0, 2, 3)) / LEVEL_STEP).astype(int).tolist()


def quadrants(num: int = 3, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames with red, green, blue and white quarters: top left, top right, bottom left, right."""
    frame = np.zeros((height, width, 3), np.uint8)
    top, left = slice(None, height // 2), slice(None, width // 2)
    frame[:] = 255
    frame[top, left] = (255, 0, 0)
    frame[top, width // 2 :] = (0, 255, 0)
    frame[height // 2 :, left] = (0, 0, 255)
    return np.repeat(frame[None], num, axis=0)


def corner_colours(pixels: np.ndarray) -> str:
    """The corners of a frame (3, H, W) as letters: top left, top right, bottom left, right."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    frame = np.asarray(pixels)
    corners = (frame[:, y, x] > 0 for y in (3, -4) for x in (3, -4))
    return "".join(names[tuple(corner.astype(int).tolist())] for corner in corners)


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: int | Fraction = 8,
    *,
    codec: str = "libx264",
    gop: int | None = None,
    options: dict[str, str] | None = None,
    faststart: bool = False,
    pixel_aspect: Fraction | None = None,
    pts: list[int] | None = None,
) -> Path:
    """Write frames (T, H, W, 3), losslessly by default; `pts` counts in frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    container_options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=container_options) as container:
        defaults = {"qp": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=fps, options={**defaults, **(options or {})})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        stream.codec_context.thread_count = 1
        if gop:
            stream.codec_context.gop_size = gop
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for number, frame in enumerate(frames):
            video_frame = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if pts:
                video_frame.pts = pts[number]
                video_frame.time_base = 1 / Fraction(fps)
            container.mux(stream.encode(video_frame))
        container.mux(stream.encode())
    return path


def rotate(path: Path, clockwise: int) -> Path:
    """Set the display rotation in an .mp4's track header, as a phone does."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
    return lay(path, (cos, sin, -sin, cos))


def lay(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Set the display matrix (a, b, c, d) in an .mp4's track header: x' = ax + cy, y' = bx + dy."""
    content = bytearray(path.read_bytes())
    a, b, c, d = (round(value * 65536) for value in matrix)
    row = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    # Version 0 of the box: 4 bytes of name, 4 of flags, 36 of times, ids and layers.
    at = content.index(b"tkhd") + 4 + 4 + 36
    content[at : at + 36] = struct.pack(">9i", *row)
    path.write_bytes(content)
    return path


def write_yuv(
    path: Path,
    planes: list[np.ndarray],
    *,
    pix_fmt: str,
    num: int = 3,
    codec: str = "ffv1",
    options: dict[str, str] | None = None,
    colorspace: int = 2,
    color_range: int = 0,
    trc: int = 2,
    primaries: int = 2,
) -> Path:
    """Write stored numbers as they are: the same frame `num` times, with tags of ITU-T H.273."""
    height, width = planes[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = colorspace, color_range
        context.color_trc, context.color_primaries = trc, primaries
        for number in range(num):
            frame = VideoFrame(width, height, pix_fmt)
            for plane, content in zip(frame.planes, planes, strict=True):
                row = content.tobytes()
                size = len(row) // content.shape[0]
                padding = bytes(plane.line_size - size)
                lines = (row[at : at + size] + padding for at in range(0, len(row), size))
                plane.update(b"".join(lines))
            frame.pts, frame.time_base = number, Fraction(1, 8)
            frame.colorspace, frame.color_range = colorspace, color_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def hold(source: Path, path: Path, *, last: int) -> Path:
    """Copy a video's packets; the last one in time lasts `last` times as long."""
    with av.open(str(source)) as read, av.open(str(path), "w") as write:
        stream = read.streams.video[0]
        copy = write.add_stream_from_template(stream)
        packets = [packet for packet in read.demux(stream) if packet.dts is not None]
        end = max(packet.pts for packet in packets)
        for packet in packets:
            if packet.pts == end:
                packet.duration *= last
            packet.stream = copy
            write.mux(packet)
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 4096), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_image(path: Path, frame: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(path)
    return path


def noise(num: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """Frames that do not compress."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def truncate(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path
