"""What a process had begun and ended, in a file that outlives it: one line of JSON each.

A GPU's illegal access ends with the process that made it, or leaves that process of no use. What
it was doing then, its parent reads here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Events:
    """Writes events; each is in the file when the call returns.

    Kinds: `begin` and `end` of a piece of work by its name; `skip` of one that is not begun;
    `finished`, the last word of a process that came to its end.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, name: str = "", **found: Any) -> None:
        """Add an event; `found` must be what JSON holds."""
        self._file.write(json.dumps({"kind": kind, "name": name, **found}) + "\n")
        self._file.flush()


def read_events(path: Path) -> list[Event]:
    """All events so far, without one that is half written; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def begun(path: Path) -> set[str]:
    """Names of the work that needs no process any more."""
    return {event["name"] for event in read_events(path) if event["kind"] in ("begin", "skip")}
