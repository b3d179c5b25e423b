"""Stopping a run politely: SIGTERM and Ctrl-C become a flag that the training loop reads."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into `requested`.

    The loop is expected to look at `requested` after every update, save and leave. A second
    Ctrl-C raises `KeyboardInterrupt` at once. The previous handlers come back at the end.

    Python gives signals to the main thread alone. In another one, nothing is changed about them:
    whoever started the thread stops the run with `request`.

    Args:
        grace: seconds after the first signal in which another Ctrl-C is taken for the same one.
            torchrun passes a Ctrl-C on to workers that the terminal has already interrupted.
    """

    def __init__(self, grace: float = 2.0) -> None:
        self.grace = grace
        self.requested = False
        self.signal_name: str | None = None
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def request(self, reason: str = "a request") -> None:
        """Ask the run to save and leave, from any thread. `reason` is what the log calls it."""
        self.requested = True
        self.signal_name = reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.request(signal.Signals(number).name)
            self._since = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since >= self.grace:
            raise KeyboardInterrupt

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
