"""End a run at a chosen moment, from inside its process, so that nothing depends on timing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from apt.train.logs import RunLog

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def die_before(chosen: Callable[[str, str], bool]) -> None:
    """Send this process SIGKILL before the first chosen change on disk.

    `chosen` is called before each change, in order, with the audit event ("open" for writing,
    "os.mkdir", "os.rename", "os.remove", "os.rmdir") and the path, which may be relative to an open
    folder.
    """

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if (event in _CHANGES or (event == "open" and _writes(*args[1:]))) and chosen(
            event, str(args[0])
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _writes(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or bool(set(mode or "") & set("wax+"))


def stopping(update: int) -> Callable[..., None]:
    """`RunLog.write`, which sends this process SIGTERM once an update is in the log."""
    write = RunLog.write

    def write_and_stop(self: RunLog, step: int, *args: Any, **options: Any) -> None:
        write(self, step, *args, **options)
        if step == update:
            os.kill(os.getpid(), signal.SIGTERM)

    return write_and_stop
