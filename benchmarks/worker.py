"""A process that runs jobs: `python -m benchmarks.worker PLAN EVENTS`.

`benchmarks.gpu` starts it and reads the events. A job that raises does not stop the others. A job
that makes the GPU unusable ends the process, and the next process continues after that job.
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
"""Exit code of a worker whose GPU has become unusable."""


def main(argv: Sequence[str]) -> int:
    """Do the rest of a plan: {"context": {...}, "deadline": ..., "jobs": [...]}."""
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
        # A failed job is reported with its traceback; the others must still run
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
    """Return the GPU's error if an earlier one has made it unusable for this process, or ""."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    # An error of the driver, torch or Triton
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
