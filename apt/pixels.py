"""Pixels as numbers of 8 bits, the same for everything that writes, shows or judges them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], clipped to it, to 0..255, rounded to the nearest."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
