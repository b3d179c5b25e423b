"""Pixels as numbers of 8 bits, the same for everything that writes, shows or judges them."""

from __future__ import annotations

import torch
from torch import Tensor

from apt.errors import InputError


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], clipped to it, to 0..255, rounded to the nearest.

    Raises InputError for pixels that are no numbers, which would come out black.
    """
    bad = int(pixels.isnan().sum())
    if bad:
        raise InputError(
            f"{bad} of {pixels.numel()} values of the pixels are NaN: the model that made them "
            "diverged, or computes in a type that is too narrow"
        )
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
