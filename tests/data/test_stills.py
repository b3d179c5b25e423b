"""Pictures as phones, cameras and browsers write them, still and moving."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("av")

import numpy as np
from PIL import Image, ImageCms

from apt.data import stills
from apt.data.decode import is_image, probe, read_clip, read_image, verify
from apt.data.reading import MediaInfo
from apt.errors import DataError
from tests.data.heic import write_heic
from tests.data.media import corner_colours, noise, numbered, numbers, quadrants

ZERO = Fraction(0)

# The picture as stored, turned so that a viewer that obeys the tag sees the original.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: np.rot90(x, -1),
}


def levels(pixels: np.ndarray) -> np.ndarray:
    """(3, 1, H, W) in [-1, 1] to (H, W, 3) uint8."""
    return np.round((np.asarray(pixels[:, 0]) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def add_png_chunk(path: Path, chunk: bytes, before: bytes) -> None:
    content = path.read_bytes()
    at = content.index(before) - 4
    path.write_bytes(content[:at] + chunk + content[at:])


def save_png(path: Path, image: Image.Image, orientation: int) -> None:
    image.save(path, exif=exif(orientation))


def save_png_with_a_late_tag(path: Path, image: Image.Image, orientation: int) -> None:
    image.save(path)
    tags = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    add_png_chunk(path, png_chunk(b"eXIf", tags), b"IEND")


def save_png_with_a_late_profile(path: Path, image: Image.Image, orientation: int) -> None:
    image.save(path)
    tags = exif(orientation).tobytes()
    text = f"\nexif\n{len(tags):8}\n{tags.hex()}\n".encode()
    chunk = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    add_png_chunk(path, chunk, b"IEND")


def save_lossless_webp(path: Path, image: Image.Image, orientation: int) -> None:
    image.save(path, exif=exif(orientation), lossless=True)


def save_tiff(path: Path, image: Image.Image, orientation: int) -> None:
    image.save(path, tiffinfo={0x0112: orientation})


def save_jpeg(path: Path, image: Image.Image, orientation: int) -> None:
    image.save(path, exif=exif(orientation), quality=100, subsampling=0)


def save_jpeg_with_xmp(path: Path, image: Image.Image, orientation: int) -> None:
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    image.save(path, xmp=xmp.encode(), quality=100, subsampling=0)


def save_avif(path: Path, image: Image.Image, orientation: int) -> None:
    image.save(path, exif=exif(orientation), quality=100, subsampling="4:4:4", speed=10)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("save", "suffix", "off"),
    [
        (save_png, ".png", 0),
        (save_png_with_a_late_tag, ".png", 0),
        (save_png_with_a_late_profile, ".png", 0),
        (save_lossless_webp, ".webp", 0),
        (save_tiff, ".tif", 0),
        (save_jpeg, ".jpg", 8),
        (save_jpeg_with_xmp, ".jfif", 8),
        (save_avif, ".avif", 8),
    ],
)
def test_every_orientation_of_every_format_is_undone(
    tmp_path: Path, save: Callable[..., None], suffix: str, off: int, orientation: int
) -> None:
    picture = np.kron(noise(1, 5, 8)[0], np.ones((4, 4, 1), np.uint8))
    path = tmp_path / f"a{suffix}"
    save(path, Image.fromarray(np.ascontiguousarray(STORED[orientation](picture))), orientation)
    info = probe(path)
    assert (info.height, info.width, info.is_image) == (20, 32, True)
    assert np.abs(levels(read_image(path)).astype(int) - picture).max() <= off
    # A size is of the upright picture too.
    assert read_image(path, size=(10, 16)).shape == (3, 1, 10, 16)
    verify(path)


@pytest.mark.parametrize(
    ("quarter_turns", "mirror", "corners"),
    [(0, None, "rgbw"), (1, None, "gwrb"), (2, None, "wbgr"), (3, None, "brwg"), (0, 0, "bwrg")],
)
def test_heic_is_turned_as_it_says(
    tmp_path: Path, quarter_turns: int, mirror: int | None, corners: str
) -> None:
    pytest.importorskip("pi_heif")
    path = write_heic(
        tmp_path / "a.heic",
        quadrants(1, 64, 96)[0],
        quarter_turns=quarter_turns,
        mirror=mirror,
    )
    path.with_name("a.jpg").write_bytes(path.read_bytes())  # as messengers call them
    for name in ("a.heic", "a.jpg"):
        info = probe(tmp_path / name)
        assert (info.height, info.width) == ((96, 64) if quarter_turns % 2 else (64, 96))
        assert (info.is_image, info.codec) == (True, "heif")
        assert corner_colours(read_image(tmp_path / name)[:, 0]) == corners
        verify(tmp_path / name)


def test_heic_without_its_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_heic(tmp_path / "a.heic", quadrants(1, 64, 96)[0])
    Image.init()
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    for look in (probe, verify, read_image):
        with pytest.raises(DataError, match=r"a\.heic: .*pip install 'diffusion-apt\[heic\]'"):
            look(path)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".jp2", ".dib", ".ppm", ".mpo"])
def test_more_names_of_pictures(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(quadrants(1)[0]).save(tmp_path / f"a{suffix}")
    assert is_image(tmp_path / f"a{suffix}")
    assert probe(tmp_path / f"a{suffix}").is_image
    assert corner_colours(read_image(tmp_path / f"a{suffix}")[:, 0]) == "rgbw"


@pytest.mark.parametrize(
    ("suffix", "options", "off"),
    [
        (".gif", {}, 0),
        (".png", {}, 0),
        (".apng", {"format": "PNG"}, 0),
        (".webp", {"lossless": True}, 0),
        (".avif", {"quality": 100, "speed": 10}, 1),
    ],
)
def test_moving_pictures_are_videos(
    tmp_path: Path, suffix: str, options: dict[str, object], off: int
) -> None:
    path = tmp_path / f"a{suffix}"
    frames = [Image.fromarray(frame) for frame in numbered(20) * 4]
    durations = [60] * 10 + [600] + [60] * 8 + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **options)
    info = probe(path)
    assert (info.is_image, info.frames, info.length) == (False, 20, 29)
    assert float(info.fps) == pytest.approx(1000 / 60, rel=1e-3)
    verify(path)
    shown = [*range(10), *[10] * 10, *range(11, 20)]
    clip = read_clip(path, start=ZERO, num_frames=29, fps=info.fps)
    assert np.abs(np.array(numbers(clip)) - 4 * np.array(shown)).max() <= off
    for first in (3, 15, 24):
        part = read_clip(path, start=first / info.fps, num_frames=4, fps=info.fps, info=info)
        assert (part == clip[:, first : first + 4]).all()
    with pytest.raises(DataError, match="ends after"):
        read_clip(path, start=20 / info.fps, num_frames=12, fps=info.fps)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_moving_pictures_build_on_the_frames_before(tmp_path: Path, suffix: str) -> None:
    """A square walks over clear ground: encoders store the part that changes."""
    frames = []
    for number in range(8):
        frame = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
        frame.paste((255, 0, 0, 255), (4 * number, 8, 4 * number + 8, 16))
        frame.putpixel((47, 31), (255, 255, 255, 1))
        frames.append(frame)
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(
        tmp_path / f"a{suffix}",
        save_all=True,
        append_images=frames[1:],
        duration=100,
        disposal=2 if suffix == ".gif" else 0,
        **options,
    )
    for first in range(8):
        clip = read_clip(
            tmp_path / f"a{suffix}", start=Fraction(first, 10), num_frames=1, fps=Fraction(10)
        )
        expected = np.full((32, 48, 3), 255, np.uint8)
        expected[8:16, 4 * first : 4 * first + 8] = (255, 0, 0)
        if suffix != ".png":  # Pillow's own blending leaves a trail there
            assert (levels(clip) == expected).all(), first
        assert (levels(clip)[8:16, 4 * first : 4 * first + 8] == (255, 0, 0)).all()
        assert (levels(clip)[20:] == 255).all()


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".avif"])
def test_a_single_frame_is_a_still(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(quadrants(1)[0]).save(tmp_path / f"a{suffix}")
    info = probe(tmp_path / f"a{suffix}")
    assert (info.is_image, info.frames, info.fps) == (True, 1, 0)
    assert corner_colours(read_image(tmp_path / f"a{suffix}")[:, 0]) == "rgbw"
    verify(tmp_path / f"a{suffix}")


PQ_CODES = (0, 105, 148, 191)
"""Black, 18 % grey, reference white and a highlight in eight bits of PQ."""


def pq_greys() -> np.ndarray:
    return np.repeat(np.array(PQ_CODES, np.uint8), 32)[None, :, None].repeat(64, 0).repeat(3, 2)


def assert_shown_as_sdr(path: Path) -> None:
    found = levels(read_image(path))[20, 16::32].astype(int)
    assert np.abs(found - np.array([0, 118, 255, 255])[:, None]).max() <= 3


def test_hdr_pictures_are_shown_as_sdr(tmp_path: Path) -> None:
    image = Image.fromarray(pq_greys())
    image.save(tmp_path / "a.png")
    add_png_chunk(tmp_path / "a.png", png_chunk(b"cICP", bytes([9, 16, 0, 1])), b"IDAT")
    assert_shown_as_sdr(tmp_path / "a.png")
    image.save(tmp_path / "a.avif", quality=100, speed=10)
    content = (tmp_path / "a.avif").read_bytes()
    at = content.index(b"colrnclx") + 8
    (tmp_path / "a.avif").write_bytes(
        content[:at] + struct.pack(">HHH", 9, 16, 9) + content[at + 6 :]
    )
    assert_shown_as_sdr(tmp_path / "a.avif")


def test_hdr_heic_is_shown_as_sdr(tmp_path: Path) -> None:
    pytest.importorskip("pi_heif")
    assert_shown_as_sdr(write_heic(tmp_path / "a.heic", pq_greys(), nclx=(9, 16, 9)))
    plain = write_heic(tmp_path / "b.heic", pq_greys(), nclx=(1, 13, 6))
    found = levels(read_image(plain))[20, 16::32, 0].astype(int)
    assert np.abs(found - PQ_CODES).max() <= 3


def swapped_profile() -> bytes:
    """sRGB whose red and blue are exchanged, under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, other in ((b"rXYZ", b"xxxx"), (b"bXYZ", b"rXYZ"), (b"xxxx", b"bXYZ")):
        profile = profile.replace(name, other, 1)
    return profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_obeyed(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 30))
    image = image.quantize() if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=swapped_profile())
    found = levels(read_image(tmp_path / "a.png"))[5, 5].astype(int)
    assert np.abs(found - (30, 100, 200)).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile at all"):
        image.save(tmp_path / "b.png", icc_profile=profile)
        assert levels(read_image(tmp_path / "b.png"))[5, 5].tolist() == [200, 100, 30]


def test_modes_of_pictures(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 128, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    found = levels(read_image(tmp_path / "a.jpg"))[5, 5].astype(int)
    assert np.abs(found - (255, 127, 0)).max() <= 3
    Image.new("LA", (16, 16), (50, 0)).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png") == 1).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "c.png")
    assert levels(read_image(tmp_path / "c.png"))[5, 5].tolist() == [0, 0, 255]
    palette.save(tmp_path / "d.png", transparency=1)
    assert (read_image(tmp_path / "d.png") == 1).all()
    Image.new("1", (16, 16), 1).save(tmp_path / "e.png")
    assert (read_image(tmp_path / "e.png") == 1).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_white_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8), 70000).save(tmp_path / "a.tif")
    for look in (read_image, verify):
        with pytest.raises(DataError, match=r"a\.tif: .*32-bit"):
            look(tmp_path / "a.tif")


def test_pages_are_refused_and_thumbnails_are_not(tmp_path: Path) -> None:
    pages = [Image.fromarray(frame) for frame in quadrants(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for look in (probe, verify):
        with pytest.raises(DataError, match=r"a\.tif: holds 3 pages"):
            look(tmp_path / "a.tif")
    small = pages[0].resize((12, 8))
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=[small])
    assert probe(tmp_path / "b.tif") == MediaInfo(True, 48, 32, 1, ZERO, "tiff")
    assert corner_colours(read_image(tmp_path / "b.tif")[:, 0]) == "rgbw"


def test_a_jpeg_is_decoded_at_a_reduced_size(tmp_path: Path) -> None:
    smooth = Image.fromarray(noise(1, 10, 15)[0]).resize((1200, 800), Image.Resampling.BICUBIC)
    for name in ("a.jpg", "a.png"):
        smooth.save(tmp_path / name, quality=95, exif=exif(6))
    found, exact = (
        levels(read_image(tmp_path / name, size=(60, 40))).astype(int)
        for name in ("a.jpg", "a.png")
    )
    assert np.abs(found - exact).mean() < 1 and np.abs(found - exact).max() <= 8
    with stills._opened(tmp_path / "a.jpg") as image:
        stills._reduce(image, (40, 60))
        assert image.size == (150, 100)
        stills._reduce(image, (800, 1200))
        assert image.size == (150, 100)


def test_sizes_have_a_limit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's would refuse it
    assert probe(tmp_path / "a.png").width == 40
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(stills, "MAX_PIXELS", 1000)
    for look in (probe, read_image, verify):
        with pytest.raises(DataError, match=r"a\.png: 40x30 pixels are more than 1,000"):
            look(tmp_path / "a.png")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_108_megapixel_photo_takes_little_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.linear_gradient("L").resize((12000, 9000)).convert("RGB").save(path, quality=80)
    script = """
import resource, sys
from pathlib import Path
from apt.data.decode import read_image, verify
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
verify(Path(sys.argv[1]))
checked = peak() - before
read_image(Path(sys.argv[1]), size=(720, 1280))
print(checked, peak() - before)
"""
    run = [sys.executable, "-c", script, path]
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    checked, read = map(float, result.stdout.split())
    # In MiB; the decoded picture alone is 412 in Pillow's four bytes a pixel.
    assert checked < (60 if suffix == ".jpg" else 500)
    assert read < (300 if suffix == ".jpg" else 1300)


def test_damage_is_found_at_any_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(1, 400, 600)[0]).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 9 // 10])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded"):
        verify(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded"):
        read_image(tmp_path / "a.jpg", size=(32, 32))


def test_damage_that_pillow_does_not_expect_is_an_error_of_the_file(tmp_path: Path) -> None:
    image, other = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "red")
    image.save(tmp_path / "a.gif", save_all=True, append_images=[other])
    moving = (tmp_path / "a.gif").read_bytes()
    # Its second frame ends behind its head.
    (tmp_path / "a.gif").write_bytes(moving[: moving.rindex(b",") + 10])
    image.save(tmp_path / "a.avif")
    (tmp_path / "a.avif").write_bytes((tmp_path / "a.avif").read_bytes().replace(b"iloc", b"free"))
    image.save(tmp_path / "a.webp", save_all=True, append_images=[other])
    moving = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(moving[: moving.index(b"ANMF")])
    for name in ("a.gif", "a.avif", "a.webp"):
        with pytest.raises(DataError, match=f"{name}: (cannot be decoded|holds no frames)"):
            probe(tmp_path / name)
