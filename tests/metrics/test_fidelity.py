from __future__ import annotations

import math

import pytest

pytest.importorskip("torchmetrics")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from apt.errors import InputError
from apt.metrics.fidelity import psnr, ssim


def pair(
    frames: int, height: int, width: int, seed: int, change: int = 20
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (frames, height, width, 3)
    first = torch.randint(0, 256, shape, generator=generator)
    second = first + torch.randint(-change, change + 1, shape, generator=generator)
    return first.to(torch.uint8), second.clamp(0, 255).to(torch.uint8)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(11, 40), st.integers(11, 40), st.integers(0, 99))
def test_agree_with_torchmetrics(frames: int, height: int, width: int, seed: int) -> None:
    first, second = pair(frames, height, width, seed)
    a, b = (x.permute(0, 3, 1, 2).double() for x in (first, second))
    assert psnr(first, second) == pytest.approx(
        peak_signal_noise_ratio(b, a, data_range=255.0).item(), rel=1e-6
    )
    _, everywhere = structural_similarity_index_measure(
        b, a, data_range=255.0, return_full_image=True
    )
    # Their mean has windows over a reflected border in it; Wang's has not.
    inside = everywhere[..., 5:-5, 5:-5].mean()
    assert ssim(first, second) == pytest.approx(inside.item(), rel=1e-6)


def test_one_grey_level_everywhere() -> None:
    black = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    assert psnr(black, black + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(black, black) == math.inf
    assert ssim(black, black) == 1


def test_what_cannot_be_compared() -> None:
    first, second = pair(2, 12, 12, 0)
    with pytest.raises(InputError, match=r"shapes \(2, 12, 12, 3\) and \(1, 12, 12, 3\)"):
        psnr(first, second[:1])
    with pytest.raises(InputError, match="uint8"):
        psnr(first.float(), second)
    with pytest.raises(InputError, match="at least 11x11"):
        ssim(first[:, :10], second[:, :10])
