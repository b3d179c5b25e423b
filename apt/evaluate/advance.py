"""How measures tell of their progress."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[int], None]
"""Told how many more files are done."""


def nobody(_: int) -> None:
    """Nobody listens."""
