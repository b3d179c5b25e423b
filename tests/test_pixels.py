from __future__ import annotations

import pytest
import torch

from apt.errors import InputError
from apt.pixels import to_uint8


def test_uint8_rounds_and_clips() -> None:
    pixels = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    assert to_uint8(pixels).tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_nan_is_no_black() -> None:
    with pytest.raises(InputError, match="1 of 2 values of the pixels are NaN"):
        to_uint8(torch.tensor([0.5, float("nan")]))
