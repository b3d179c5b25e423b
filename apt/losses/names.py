"""Losses by name."""

from __future__ import annotations

from typing import Any

from apt.registry import Registry

LOSSES: Registry[Any] = Registry("loss")


def list_losses(pattern: str = "*") -> list[str]:
    """Names of registered losses that match a shell-style pattern, sorted."""
    return LOSSES.names(pattern)
