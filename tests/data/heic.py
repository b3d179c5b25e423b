"""HEIC files for the tests: an HEVC picture in the boxes of ISO/IEC 23008-12."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame


def write_heic(
    path: Path,
    picture: np.ndarray,
    *,
    quarter_turns: int = 0,
    mirror: int | None = None,
    nclx: tuple[int, int, int] | None = None,
) -> Path:
    """Write a picture (H, W, 3).

    Readers rotate it by `quarter_turns`, anticlockwise (irot), and mirror it before or after that
    as `mirror` says (imir): 0 swaps top and bottom, 1 left and right. `nclx` are primaries,
    transfer function and matrix.
    """
    config, sample = _hevc(picture)
    height, width = picture.shape[:2]
    properties = [_box(b"hvcC", config), _full(b"ispe", struct.pack(">II", width, height))]
    if nclx:
        properties.append(_box(b"colr", b"nclx" + struct.pack(">HHHB", *nclx, 0)))
    if quarter_turns:
        properties.append(_box(b"irot", bytes([quarter_turns])))
    if mirror is not None:
        properties.append(_box(b"imir", bytes([mirror])))
    numbers = bytes(range(1, len(properties) + 1))
    item = _full(b"infe", struct.pack(">HH4sB", 1, 0, b"hvc1", 0), version=2)

    def meta(offset: int) -> bytes:
        place = struct.pack(">BBHHHHII", 0x44, 0, 1, 1, 0, 1, offset, len(sample))
        association = struct.pack(">IHB", 1, 1, len(numbers)) + numbers
        return _full(
            b"meta",
            _full(b"hdlr", struct.pack(">I4s12xB", 0, b"pict", 0))
            + _full(b"pitm", struct.pack(">H", 1))
            + _full(b"iloc", place)
            + _full(b"iinf", struct.pack(">H", 1) + item)
            + _box(b"iprp", _box(b"ipco", b"".join(properties)) + _full(b"ipma", association)),
        )

    head = _box(b"ftyp", b"heic" + struct.pack(">I", 0) + b"mif1heic")
    path.write_bytes(head + meta(len(head) + len(meta(0)) + 8) + _box(b"mdat", sample))
    return path


def _hevc(picture: np.ndarray) -> tuple[bytes, bytes]:
    """(decoder configuration, coded picture), without loss except for the conversion to YCbCr."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"x265-params": "log-level=none:lossless=1:bframes=0"}
        stream = container.add_stream("libx265", rate=8, options=options)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuv420p"
        frame = VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1, 8)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = file.getvalue()
    at = content.index(b"hvcC")
    size = struct.unpack(">I", content[at - 4 : at])[0]
    with av.open(io.BytesIO(content)) as container:
        sample = bytes(next(packet for packet in container.demux(video=0) if packet.size))
    return content[at + 4 : at - 4 + size], sample


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _full(kind: bytes, content: bytes, version: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24) + content)
