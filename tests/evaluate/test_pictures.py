from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apt.errors import DataError, InputError
from apt.evaluate.pictures import (
    clean_resize,
    crop_middle,
    crop_square,
    list_pictures,
    read_picture,
    upsample,
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


sides = st.integers(1, 40)


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.integers(1, 40))
def test_resize_is_the_antialiased_bicubic_of_torch(height: int, width: int, side: int) -> None:
    picture = noise(height, width)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
    theirs = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    expected = theirs[0].permute(1, 2, 0).clamp(0, 255).numpy()
    resized = clean_resize(picture, (side, side))
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=0.01)


def test_resize_does_not_round_and_clips() -> None:
    step = np.zeros((8, 8, 3), np.uint8)
    step[:, 4:] = 255
    resized = clean_resize(step, (8, 13))
    assert resized.min() == 0 and resized.max() == 255
    assert not np.array_equal(resized, resized.round())
    np.testing.assert_array_equal(clean_resize(step, (8, 8)), step)


@settings(max_examples=30, deadline=None)
@given(sides, sides)
def test_the_middle_square(height: int, width: int) -> None:
    picture = noise(height, width)
    side = min(height, width)
    square = crop_square(picture)
    assert square.shape == (side, side, 3)
    top, left = (height - side) // 2, (width - side) // 2
    np.testing.assert_array_equal(square, picture[top : top + side, left : left + side])
    np.testing.assert_array_equal(crop_middle(picture, side), square)
    with pytest.raises(InputError, match=f"{width}x{height} pixels has no patch"):
        crop_middle(picture, side + 1)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 31), (31, 12)])
def test_upsampling_is_bilinear(height: int, width: int) -> None:
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    ramp = np.stack([rows, columns, rows + columns], axis=-1)
    larger = upsample(ramp, 2 * min(height, width))
    assert larger.shape == (2 * height, 2 * width, 3)
    # Between the centres of the outer pixels a ramp stays one, of half the slope.
    expected = (np.arange(2 * height) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(larger[1:-1, 5, 0], expected[1:-1], atol=1e-4)


class TestReading:
    def test_jpeg_and_png_are_as_pillow_reads_them(self, tmp_path: Path) -> None:
        for name in ("a.png", "a.jpg"):
            Image.fromarray(noise(17, 23)).save(tmp_path / name)
            expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
            np.testing.assert_array_equal(read_picture(tmp_path / name), expected)

    def test_grey_is_three_equal_channels(self, tmp_path: Path) -> None:
        grey = noise(9, 7)[..., 0]
        Image.fromarray(grey).save(tmp_path / "a.png")
        np.testing.assert_array_equal(
            read_picture(tmp_path / "a.png"), np.repeat(grey[..., None], 3, axis=2)
        )

    def test_transparent_is_over_white(self, tmp_path: Path) -> None:
        pixels = np.concatenate([noise(9, 7), np.zeros((9, 7, 1), np.uint8)], axis=2)
        pixels[:4, :, 3] = 255
        Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
        picture = read_picture(tmp_path / "a.png")
        np.testing.assert_array_equal(picture[:4], pixels[:4, :, :3])
        assert (picture[4:] == 255).all()

    def test_a_turned_photo_is_upright(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise(9, 16)).save(tmp_path / "a.jpg", exif=exif, quality=100)
        stored = np.asarray(Image.open(tmp_path / "a.jpg"))
        np.testing.assert_array_equal(read_picture(tmp_path / "a.jpg"), np.rot90(stored, -1))

    def test_a_broken_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"a\.png"):
            read_picture(tmp_path / "a.png")


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        list_pictures(tmp_path / "none")
    with pytest.raises(DataError, match="has no images"):
        list_pictures(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("sub/b.jpg", "a.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert list_pictures(tmp_path) == [tmp_path / "a.png", tmp_path / "sub/b.jpg"]
