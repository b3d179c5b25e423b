"""How measures report their progress."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[int], None]
"""Called with the number of files that were just finished."""


def nobody(_: int) -> None:
    """Ignore progress."""
