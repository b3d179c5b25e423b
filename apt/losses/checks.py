"""Checks of options and tensors that all losses share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apt.errors import ConfigError, InputError


def check_number(owner: str, name: str, value: float, *, positive: bool = False) -> None:
    """Raise ConfigError unless an option is a finite number, at least 0 (or above 0)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (positive and value == 0):
        expected = "a finite number above 0" if positive else "a finite number, at least 0"
        raise ConfigError(f"{owner}: {name} must be {expected}, got {value!r}")


def at_least_fp32(name: str, tensor: Tensor) -> Tensor:
    """Return fp32 and fp64 unchanged and half precision as fp32; else raise InputError."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputError(f"{name} must be a floating-point tensor, got {got}")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_logits(name: str, logits: Tensor) -> Tensor:
    """Return logits (B,), B >= 1, in at least fp32. Raises InputError for anything else."""
    logits = at_least_fp32(name, logits)
    if logits.ndim != 1 or logits.shape[0] == 0:
        raise InputError(
            f"{name} must have shape (B,), one logit per sample, got {tuple(logits.shape)}"
        )
    return logits


def check_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Raise InputError unless two tensors have the same shape, so that neither is broadcast."""
    if a.shape != b.shape:
        raise InputError(
            f"{name_a} and {name_b} must have the same shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
