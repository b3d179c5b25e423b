"""Checks of the numbers in a configuration. Messages name the option."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from apt.errors import ConfigError


def check_finite(config: Any, prefix: str) -> None:
    """Raise ConfigError if a number, also within a tuple, is NaN or infinite."""
    for field in fields(config):
        for number in _numbers(getattr(config, field.name)):
            if not math.isfinite(number):
                raise ConfigError(f"{prefix}{field.name} must be a finite number, got {number}")


def check_range(
    config: Any,
    prefix: str,
    limits: Mapping[str, tuple[float, float]],
    *,
    open_end: bool = False,
) -> None:
    """Raise ConfigError unless the named numbers, also within tuples, lie within their limits.

    Both limits are inclusive; with `open_end`, only the lower one is. None is skipped.
    """
    for name, (low, high) in limits.items():
        for number in _numbers(getattr(config, name)):
            if low <= number <= high and not (open_end and number == high):
                continue
            wanted = f"in [{low}, {high}]"
            if high == math.inf:
                wanted = f"at least {low}"
            elif open_end:
                wanted = f"at least {low} and below {high}"
            raise ConfigError(f"{prefix}{name} must be {wanted}, got {number}")


def check_positive(config: Any, prefix: str, *names: str) -> None:
    """Raise ConfigError unless the named numbers are above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{prefix}{name} must be positive, got {getattr(config, name)}")


def _numbers(value: Any) -> Iterable[float]:
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
