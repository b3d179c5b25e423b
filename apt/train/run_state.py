"""The state of a run for schedulers and scripts: `state.json` in its folder, and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from apt.checkpoints.runs import STATE_NAME
from apt.distributed.launch import job, under_torchrun
from apt.files import write_text

__all__ = [
    "EXIT_UNFINISHED", "STATE_NAME", "State", "exit_status", "is_of_this_job",
    "write_state",
]  # fmt: skip

EXIT_UNFINISHED = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""

State = Literal["running", "unfinished", "finished", "failed"]


def write_state(
    run_dir: Path, state: State, *, update: int, num_updates: int, reason: str = ""
) -> None:
    """Write `state.json`, whole or not at all.

    Args:
        run_dir: folder of the run.
        state: "running" (also after a kill), "unfinished" (stopped and saved; can be continued),
            "finished", or "failed".
        update: updates done.
        num_updates: updates of the whole run.
        reason: the signal or the error.

    Raises:
        OSError: writing failed.
    """
    content = {"state": state, "update": update, "num_updates": num_updates, "reason": reason}
    if job():
        content["job"] = job()
    write_text(run_dir / STATE_NAME, json.dumps(content) + "\n")


def is_of_this_job(run_dir: Path) -> bool:
    """Return whether this launch of torchrun has already worked on this run."""
    file = run_dir / STATE_NAME
    if not job() or not file.is_file():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8")).get("job") == job())


def exit_status(finished: bool) -> int:
    """Return 0, or 75 for a run that was stopped and saved, and should be continued.

    Under torchrun it is always 0, because torchrun takes any other status for a crash and restarts
    the ranks at once; read `state.json` instead.
    """
    return 0 if finished or under_torchrun() else EXIT_UNFINISHED
