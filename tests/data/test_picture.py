from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apt.data import picture
from apt.data.picture import _TO_BT709, HLG, PQ, ColorTags, resize_and_crop, to_sdr
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


def test_a_frame_of_the_right_size_is_untouched() -> None:
    frame = torch.randint(0, 256, (3, 17, 23), dtype=torch.uint8)
    pixels = resize_and_crop(frame, (17, 23))
    assert pixels.dtype == torch.float32
    assert ((pixels + 1) * 127.5).round().to(torch.uint8).equal(frame)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    source=st.tuples(st.integers(5, 60), st.integers(5, 60)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_size_is_filled(source: tuple[int, int], size: tuple[int, int]) -> None:
    frame = torch.full((3, *source), 200, dtype=torch.uint8)
    pixels = resize_and_crop(frame, size)
    assert pixels.shape == (3, *size)
    assert torch.allclose(pixels, torch.tensor(200 / 127.5 - 1), atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", [0.4, 0.5, 0.75, 1.3])
def test_resizing_agrees_with_pillow(scale: float, seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    size = (round(40 * scale), round(60 * scale))
    ours = resize_and_crop(torch.from_numpy(drawn).permute(2, 0, 1), size)
    for channel, plane in enumerate(ours.numpy()):
        # In floats: on bytes Pillow also rounds and clips between its two passes.
        grey = Image.fromarray(drawn[..., channel].astype(np.float32))
        theirs = np.asarray(grey.resize(size[::-1], Image.Resampling.BICUBIC))
        assert np.abs((plane + 1) * 127.5 - theirs.clip(0, 255)).max() < 0.05


@pytest.mark.parametrize(("source", "size"), [((20, 60), (20, 20)), ((60, 20), (20, 20))])
def test_the_crop_is_central(source: tuple[int, int], size: tuple[int, int]) -> None:
    frame = torch.zeros(3, *source, dtype=torch.uint8)
    long = source.index(60)
    frame.narrow(long + 1, 20, 20).fill_(255)
    assert (resize_and_crop(frame, size) == 1).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_strip_is_cut_before_it_is_scaled(monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    scaled = []
    scale = picture._scale
    monkeypatch.setattr(picture, "_scale", lambda x, s: scaled.append(x.numel()) or scale(x, s))
    strip = torch.rand(3, 48, 48 * 101, generator=torch.Generator().manual_seed(0)) * 255
    middle = strip[:, :, 48 * 48 : -48 * 48]
    if turned:
        strip, middle = strip.transpose(1, 2), middle.transpose(1, 2)
    found = resize_and_crop(strip, (24, 24))
    assert max(scaled) <= 3 * 48 * 98
    assert (found - resize_and_crop(middle, (24, 24))).abs().max() < 1e-4


def test_oblong_pixels_are_stretched() -> None:
    frame = torch.zeros(3, 20, 20, dtype=torch.uint8)
    frame[:, :, 10:] = 255
    pixels = resize_and_crop(frame, (20, 40), display_size=(20, 40))
    assert (pixels[:, :, :17] < -0.9).all()
    assert (pixels[:, :, 23:] > 0.9).all()


def test_bands_of_a_large_picture_are_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = torch.randint(0, 256, (3, 97, 131), dtype=torch.uint8)
    for size in ((30, 41), (97, 60), (120, 131), (97, 131)):
        whole = resize_and_crop(frame, size)
        with monkeypatch.context() as patch:
            patch.setattr(picture, "_BAND", 131 * 10)
            assert torch.equal(resize_and_crop(frame, size), whole)
    assert torch.equal(resize_and_crop(frame.float(), (30, 41)), resize_and_crop(frame, (30, 41)))
