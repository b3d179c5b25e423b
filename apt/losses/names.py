"""The registry of losses."""

from __future__ import annotations

from typing import Any

from apt.registry import Registry

LOSSES: Registry[Any] = Registry("loss")


def list_losses(pattern: str = "*") -> list[str]:
    """Return the sorted names of registered losses that match a shell-style pattern."""
    return LOSSES.names(pattern)
