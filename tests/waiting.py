"""Wait for a condition, not for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(fact: Callable[[], object], seconds: float = 300) -> None:
    """Return as soon as `fact` is true; fail if that takes far longer than a busy machine needs."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)
