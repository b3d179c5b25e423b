"""Devices that are not there, and memory: found out beforehand where arithmetic can, and said in
one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from apt.errors import InputError

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_SIGNS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "size calculation overflow",
)
"""What torch's RuntimeErrors say; it has a class of its own for accelerators alone."""
_BF16_CAPABILITY = 8
"""Ampere: GPUs before it only imitate bfloat16."""


def find_device(name: torch.device | str) -> torch.device:
    """The device of that name. Raises InputError if this machine has none."""
    import torch

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


@contextmanager
def explained_memory(doing: str, advice: str) -> Iterator[None]:
    """Turn what Python and torch raise for want of memory into an InputError.

    Args:
        doing: what was tried, such as "loading the model".
        advice: what to do.
    """
    try:
        yield
    except InputError:
        raise
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(sign in text for sign in _SIGNS):
            raise
        raise InputError(
            f"out of memory while {doing} ({text.strip().partition(chr(10))[0][:120]}); {advice}"
        ) from error


def require_memory(num_bytes: int, device: torch.device, doing: str, advice: str) -> None:
    """Raise InputError if a device has less memory in all than is surely needed.

    Main memory is promised by the system before it is there: a program that asks for too much is
    not refused but killed, without a word.
    """
    there = total_memory(device)
    if there is not None and num_bytes > there:
        raise InputError(
            f"{doing} needs more than {num_bytes / _GIB:,.0f} GiB, and {device} has "
            f"{there / _GIB:,.0f} GiB; {advice}"
        )


def total_memory(device: torch.device) -> int | None:
    """Bytes of a device; None where that is not known."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def computes_in_bf16(name: str) -> bool:
    """Whether a device, "auto" for a GPU if there is one, has units for bfloat16."""
    import torch

    if name != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= _BF16_CAPABILITY
    # PyTorch has no public names for them in all versions that are supported.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
