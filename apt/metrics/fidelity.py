"""PSNR and SSIM: how close pixels are to a reference that they should equal.

They are for engineering: 8 bits against 16, a kernel against its reference, an export against its
source. They compare two versions of one image and mean nothing for two different samples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.errors import InputError

_PEAK = 255.0
_WINDOW, _DEVIATION = 11, 1.5


def check_alike(reference: Tensor, test: Tensor) -> None:
    """Raise InputError unless both are uint8 (T, H, W, 3) of the same shape."""
    if reference.shape != test.shape or reference.ndim != 4 or reference.shape[-1] != 3:
        raise InputError(
            f"frames of shapes {tuple(reference.shape)} and {tuple(test.shape)} cannot be "
            "compared; expected the same shape (T, H, W, 3) for both"
        )
    if reference.dtype != torch.uint8 or test.dtype != torch.uint8:
        raise InputError(f"frames must be uint8, got {reference.dtype} and {test.dtype}")


def psnr(reference: Tensor, test: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two videos in dB, over all frames.

    10 log10(255² / mean squared error) of uint8 (T, H, W, 3); infinite for equal videos. Raises
    InputError for other frames.
    """
    check_alike(reference, test)
    total = sum(
        (a.double() - b.double()).square().sum().item()
        for a, b in zip(reference, test, strict=True)
    )
    return 10 * math.log10(_PEAK**2 * reference.numel() / total) if total else math.inf


def ssim(reference: Tensor, test: Tensor) -> float:
    """Return the structural similarity (Wang et al., 2004) of two videos; 1 for equal videos.

    The mean over frames, channels and all Gaussian windows (11x11 pixels, standard deviation 1.5)
    that lie within the frame, with K1 = 0.01 and K2 = 0.03, of uint8 (T, H, W, 3). Raises
    InputError for other frames, and for frames smaller than a window.
    """
    check_alike(reference, test)
    if min(reference.shape[1:3]) < _WINDOW:
        raise InputError(
            f"SSIM needs frames of at least {_WINDOW}x{_WINDOW} pixels, got "
            f"{tuple(reference.shape[1:3])}"
        )
    frames = [_ssim(a, b) for a, b in zip(reference, test, strict=True)]
    return sum(frames) / len(frames)


def _ssim(reference: Tensor, test: Tensor) -> float:
    x, y = (frame.double().permute(2, 0, 1)[:, None] for frame in (reference, test))
    places = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    row = torch.exp(-((places / _DEVIATION) ** 2) / 2)
    row = row / row.sum()

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, row.view(1, 1, -1, 1)), row.view(1, 1, 1, -1))

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(likeness.mean())
