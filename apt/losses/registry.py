"""The registry of losses and the two functions that read it."""

from __future__ import annotations

from typing import Any

from apt.registry import Registry

LOSSES: Registry[Any] = Registry("loss")


def create_loss(name: str, /, **options: Any) -> Any:
    """Build a registered loss: a small frozen object that is called with tensors.

    Args:
        name: see `list_losses`.
        **options: fields of the loss, checked by name, type and range.

    Raises:
        InputError: for an unknown name or option (with close matches), or a value out of range.
    """
    return LOSSES.create(name, **options)


def list_losses(pattern: str = "*") -> list[str]:
    """Names of registered losses that match a shell-style pattern, sorted."""
    return LOSSES.names(pattern)
