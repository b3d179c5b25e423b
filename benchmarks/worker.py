"""Jobs in a process of their own: `python -m benchmarks.worker PLAN EVENTS`.

Started by `benchmarks.gpu`, which reads the events. A job that raises ends no other; one that
leaves the GPU of no use ends the process, and the next process goes on behind it.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.events import Events, begun

LOST = 3
"""Exit code of a worker whose GPU is of no use any more."""


def main(argv: Sequence[str]) -> int:
    """Do what is left of a plan: {"context": {...}, "deadline": ..., "jobs": [...]}."""
    plan = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    done, events = begun(Path(argv[1])), Events(Path(argv[1]))
    for job in plan["jobs"]:
        name = job["name"]
        if name in done:
            continue
        left = plan["deadline"] - time.monotonic()
        if left < job["seconds"] and not plan["context"]["rehearsal"]:
            events.write("skip", name)
            continue
        events.write("begin", name)
        found: dict[str, Any] = {}
        try:
            module, _, function = job["call"].partition(":")
            found = getattr(importlib.import_module(module), function)(
                plan["context"], **job["options"]
            )
        # What one job breaks is reported, with its traceback; the others still get their times
        except Exception:
            found = {"traceback": traceback.format_exc()}
            traceback.print_exc()
        lost = why_lost()
        events.write("end", name, **found, **({"lost": lost} if lost else {}))
        if lost:
            return LOST
    events.write("finished")
    return 0


def why_lost() -> str:
    """What the GPU answers if an earlier error has left it of no use to this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    # The driver's, torch's or Triton's
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
