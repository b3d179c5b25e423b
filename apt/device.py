"""Checks for missing devices and too little memory, reported in one line and early if possible."""

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
"""Texts of torch's RuntimeErrors: only accelerators have an exception class of their own."""
_BF16_CAPABILITY = 8
"""Ampere: older GPUs only emulate bfloat16."""


def find_device(name: torch.device | str) -> torch.device:
    """Return the device of that name. Raises InputError if this machine does not have it."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; choose cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"there is no device {str(name)!r}: PyTorch sees {torch.cuda.device_count()} GPUs "
            "here; choose cpu, or install a PyTorch build for this GPU"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the device {str(name)!r} cannot be used here: {reason}") from error
    return device


@contextmanager
def explained_memory(doing: str, advice: str) -> Iterator[None]:
    """Turn the out-of-memory errors of Python and torch into an InputError.

    Args:
        doing: the activity that failed, such as "loading the model".
        advice: what the user can do.
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
    """Raise InputError if the total memory of a device is less than `num_bytes`, a lower bound.

    Operating systems overcommit main memory: a program that asks for too much gets no error and is
    killed later, without a message.
    """
    there = total_memory(device)
    if there is not None and num_bytes > there:
        raise InputError(
            f"{doing} needs more than {num_bytes / _GIB:,.0f} GiB, and {device} has "
            f"{there / _GIB:,.0f} GiB; {advice}"
        )


def total_memory(device: torch.device) -> int | None:
    """Return the memory of a device in bytes; None if it is not known."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def computes_in_bf16(name: str) -> bool:
    """Return whether a device ("auto": a GPU if there is one) has hardware support for bfloat16."""
    import torch

    if name != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= _BF16_CAPABILITY
    # Not every supported version of PyTorch has public names for these.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
