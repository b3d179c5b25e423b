from __future__ import annotations

import numpy as np
import pytest
import torch

from apt.data.color import _TO_BT709, HLG, PQ, ColorTags, to_sdr
from apt.pixels import to_uint8


def grey(*signal: float) -> torch.Tensor:
    """(3, n, 1) in [-1, 1]."""
    return (torch.tensor(signal) * 2 - 1).expand(3, -1)[..., None]


@pytest.mark.parametrize(
    ("transfer", "signal"),
    # Black, 18 % grey, reference white and a highlight, computed from the standards' formulas.
    [(PQ, (0.0, 0.4111, 0.58069, 0.75)), (HLG, (0.0, 0.3784, 0.75, 1.0))],
)
def test_reference_white_is_white_and_grey_is_grey(
    transfer: int, signal: tuple[float, ...]
) -> None:
    shown = to_uint8(to_sdr(grey(*signal), ColorTags(9, transfer)))
    assert (shown - torch.tensor([0, 118, 255, 255])[:, None]).abs().max() <= 1


def test_sdr_stays_bit_for_bit() -> None:
    pixels = torch.rand(3, 4, 5) * 2 - 1
    for primaries in (1, 2, 5, 6):
        for transfer in (1, 2, 6, 13, 14):
            assert to_sdr(pixels, ColorTags(primaries, transfer)) is pixels


@pytest.mark.parametrize(
    ("primaries", "corners"),
    [
        (9, ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))),
        (12, ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))),
    ],
)
def test_the_matrices_are_those_of_the_chromaticities(
    primaries: int, corners: tuple[tuple[float, float], ...]
) -> None:
    bt709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
    matrix = np.linalg.inv(to_xyz(bt709)) @ to_xyz(corners)
    assert np.abs(matrix - np.array(_TO_BT709[primaries])).max() < 2e-6


def to_xyz(corners: tuple[tuple[float, float], ...]) -> np.ndarray:
    def column(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    columns = np.stack([column(x, y) for x, y in corners], axis=1)
    return columns * np.linalg.solve(columns, column(0.3127, 0.3290))


def test_wide_gamuts_keep_greys_and_bring_colours_nearer_to_their_edge() -> None:
    ramp = grey(0.0, 0.1, 0.5, 1.0)
    for primaries in (9, 11, 12):
        tags = ColorTags(primaries, 1)
        assert torch.allclose(to_sdr(ramp, tags), ramp, atol=1e-3)
        red = torch.tensor([0.8, 0.3, 0.3]).reshape(3, 1, 1) * 2 - 1
        shown = to_sdr(red, tags)
        assert shown[0] > red[0] and shown[1] < red[1]
    pure = torch.tensor([1.0, -1.0, -1.0]).reshape(3, 1, 1)
    assert torch.allclose(to_sdr(pure, ColorTags(9, PQ)), pure, atol=1e-3)
