"""Devices by name, if this machine has them."""

from __future__ import annotations

import torch

from apt.errors import InputError

_BF16_CAPABILITY = 8
"""Ampere: GPUs before it only imitate bfloat16."""


def find_device(name: torch.device | str) -> torch.device:
    """The device of that name. Raises InputError if this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; choose cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"there is no device {str(name)!r}: PyTorch sees {torch.cuda.device_count()} GPUs "
            "here; choose cpu, or install a build of PyTorch for this GPU"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the device {str(name)!r} cannot be used here: {reason}") from error
    return device


def computes_in_bf16(name: str) -> bool:
    """Whether a device, "auto" for a GPU if there is one, has units for bfloat16."""
    if name != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= _BF16_CAPABILITY
    # PyTorch has no public names for them in all versions that are supported.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
