"""A log of what a process began and ended, in a file that survives it: one JSON object per line.

An illegal access on a GPU kills the process, or makes the GPU unusable for it. This file tells the
parent process what it was doing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Events:
    """Writes events; each is in the file when the call returns.

    Kinds: `begin` and `end` of a named piece of work; `skip` for one that is not started;
    `finished` when a process has done all its work.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, name: str = "", **found: Any) -> None:
        """Write an event; the values of `found` must be JSON values."""
        self._file.write(json.dumps({"kind": kind, "name": name, **found}) + "\n")
        self._file.flush()


def read_events(path: Path) -> list[Event]:
    """Read all events so far, except one that is half written; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def begun(path: Path) -> set[str]:
    """Return the names of work that was begun or skipped and will not be started again."""
    return {event["name"] for event in read_events(path) if event["kind"] in ("begin", "skip")}
