"""Turn SIGTERM and Ctrl-C into a flag that the training loop reads, to stop a run cleanly."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """Context manager that turns SIGTERM and SIGINT into `requested`.

    The training loop should check `requested` between micro-batches, save and return. A second
    Ctrl-C raises `KeyboardInterrupt` at once. The previous handlers are restored at the end.

    Python delivers signals to the main thread only. In another thread, signal handlers stay as they
    are, and the code that started the thread stops the run with `request`.

    Args:
        grace: seconds after the first signal in which another Ctrl-C is ignored, because torchrun
            passes a Ctrl-C on to workers that the terminal has already interrupted.
    """

    def __init__(self, grace: float = 2.0) -> None:
        self.grace = grace
        self.requested = False
        self.signal_name: str | None = None
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def request(self, reason: str = "a request") -> None:
        """Ask the run to save and stop, from any thread. The log shows `reason`."""
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
