"""Metadata of pictures that Pillow does not report: orientation and colours."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

from PIL import Image

from apt.data.picture import ColorTags
from apt.data.reading import Source, bytes_of

_ORIENTATION = 0x0112
_LATE_TEXT = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def orientation(source: Source, image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of the pixels that Pillow will load."""
    if image.format == "TIFF":
        return 1  # Pillow rotates these itself
    exif = _png_exif(source, image) if image.format == "PNG" else image.getexif()
    found = exif.get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def color_tags(source: Source, image: Image.Image) -> ColorTags:
    """Read the colour description from PNG's cICP chunk, or the nclx box of AVIF and HEIC."""
    with bytes_of(source) as file:
        if image.format == "PNG":
            for kind, size in _png_chunks(file):
                if kind == b"cICP" and size == 4:
                    return ColorTags(*file.read(2))
        elif image.format in ("AVIF", "HEIF"):
            file.seek(0)
            return _primary_nclx(file)
    return ColorTags()


def _png_exif(source: Source, image: Image.Image) -> Image.Exif:
    """Read the EXIF tags from anywhere in the file. Pillow would decode the pixels to find them."""
    with bytes_of(source) as file:
        pixels_begun = False
        for kind, size in _png_chunks(file):
            pixels_begun = pixels_begun or kind == b"IDAT"
            if kind == b"eXIf":
                exif = Image.Exif()
                exif.load(file.read(size))
                return exif
            late_text = pixels_begun and kind in (b"tEXt", b"zTXt", b"iTXt")
            if late_text and file.read(32).startswith(_LATE_TEXT):
                return image.getexif()
    return Image.Image.getexif(image)


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield (type, size) of each chunk, with the file positioned at its content."""
    at = 8
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return
        size, kind = struct.unpack(">I4s", head)
        yield kind, size
        at += 12 + size


def _primary_nclx(file: IO[bytes]) -> ColorTags:
    """Read the colours of the primary item; others may be its HDR versions (ISO/IEC 23008-12)."""
    meta = next((body for kind, body in _boxes(file.read(1 << 20)) if kind == b"meta"), b"")
    inside = dict(_boxes(meta[4:]))
    item = (
        struct.unpack(">I", inside[b"pitm"][4:].rjust(4, b"\0")[:4])[0] if b"pitm" in inside else 0
    )
    properties = dict(_boxes(inside.get(b"iprp", b"")))
    every = list(_boxes(properties.get(b"ipco", b"")))
    for number in _associated(properties.get(b"ipma", b""), item):
        kind, body = every[number - 1] if 0 < number <= len(every) else (b"", b"")
        if kind == b"colr" and body[:4] == b"nclx" and len(body) >= 8:
            return ColorTags(*struct.unpack(">HH", body[4:8]))
    return ColorTags()


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        head = 8
        if size == 1 and at + 16 <= len(content):
            size, head = struct.unpack(">Q", content[at + 8 : at + 16])[0], 16
        end = at + size if size else len(content)
        if end < at + head:
            return
        yield kind, content[at + head : end]
        at = end


def _associated(ipma: bytes, item: int) -> list[int]:
    """Return the numbers, from 1, of an item's properties."""
    if len(ipma) < 8:
        return []
    version, wide = ipma[0], ipma[3] & 1
    count = struct.unpack(">I", ipma[4:8])[0]
    at = 8
    name = ">I" if version else ">H"
    for _ in range(count):
        here = struct.unpack_from(name, ipma, at)[0]
        at += struct.calcsize(name)
        num = ipma[at]
        entries = struct.unpack_from(f">{num}{'H' if wide else 'B'}", ipma, at + 1)
        at += 1 + num * (2 if wide else 1)
        if here == item:
            return [entry & (0x7FFF if wide else 0x7F) for entry in entries]
    return []
