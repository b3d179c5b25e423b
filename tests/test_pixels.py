from __future__ import annotations

import pytest
import torch

from apt.errors import InputError
from apt.pixels import (
    check_output_type,
    to_array,
    to_frames,
    to_images,
    to_uint8,
    to_unit,
)

# A pixel of each corner of the range, and what lies outside of it.
PIXELS = torch.tensor([-1.0, 1.0, 0.0, -3.0, 3.0, 0.5]).reshape(1, 1, 1, 2, 3).expand(2, 3, 4, 2, 3)


def test_every_type_shows_the_same_picture() -> None:
    frames, unit = to_frames(PIXELS), to_unit(PIXELS)
    assert frames.shape == (2, 4, 2, 3, 3) and frames.dtype == torch.uint8
    assert unit.shape == (2, 4, 3, 2, 3) and unit.dtype == torch.float32
    assert unit[0, 0, 0].flatten().tolist() == [0, 1, 0.5, 0, 1, 0.75]
    array = to_array(unit)
    assert array.shape == (2, 4, 2, 3, 3)
    assert abs(array * 255 - frames.numpy()).max() <= 0.5
    images = to_images(frames)
    assert [len(video) for video in images] == [4, 4]
    image = images[1][3]
    assert (image.size, image.mode) == ((3, 2), "RGB")
    assert image.getpixel((1, 0)) == (255, 255, 255) and image.getpixel((0, 0)) == (0, 0, 0)


def test_an_unknown_type_names_those_there_are() -> None:
    with pytest.raises(InputError, match="one of uint8, pt, np, pil, got 'latent'"):
        check_output_type("latent")


def test_uint8_rounds_and_clips() -> None:
    pixels = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    assert to_uint8(pixels).tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_nan_is_no_black() -> None:
    with pytest.raises(InputError, match="1 of 2 pixel values are NaN"):
        to_uint8(torch.tensor([0.5, float("nan")]))
