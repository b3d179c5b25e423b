"""How a run stands: `state.json` and exit statuses for schedulers and scripts, and inside an update
for itself, so that an error in the middle loses nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from apt.checkpoints.runs import STATE_NAME
from apt.distributed.launch import job, under_torchrun
from apt.files import write_text

__all__ = [
    "EXIT_UNFINISHED", "STATE_NAME", "PartsDone", "State", "exit_status", "is_of_this_job",
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
        state: "running" (also after a kill), "unfinished" (stopped and saved: continue it),
            "finished", or "failed".
        update: updates done; num_updates: of the whole run.
        reason: the signal or the error.

    Raises:
        OSError: the disk refuses.
    """
    content = {"state": state, "update": update, "num_updates": num_updates, "reason": reason}
    if job():
        content["job"] = job()
    write_text(run_dir / STATE_NAME, json.dumps(content) + "\n")


def is_of_this_job(run_dir: Path) -> bool:
    """Whether ranks of this launch of torchrun had this run in hand."""
    file = run_dir / STATE_NAME
    if not job() or not file.is_file():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8")).get("job") == job())


def exit_status(finished: bool) -> int:
    """0, or 75 for a run that was stopped, saved and is to be continued.

    Under torchrun it is always 0, because torchrun takes any other for a crash and starts the
    ranks again at once; there `state.json` tells.
    """
    return 0 if finished or under_torchrun() else EXIT_UNFINISHED


@dataclass
class PartsDone:
    """The parts of the update under way that have moved weights, and what they measured.

    Attributes:
        parts: names of the parts that are done: of an adversarial update, the discriminator's half
            and the generator's.
        metrics: of those parts, means over all ranks.
    """

    parts: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any] | None) -> PartsDone:
        """What a checkpoint says; nothing, if it was saved between updates."""
        under_way = (meta or {}).get("under_way")
        if under_way is None:
            return cls()
        return cls(list(under_way["parts"]), dict(under_way["metrics"]))

    def as_meta(self) -> dict[str, Any]:
        """What a checkpoint has to say of it."""
        if not self.parts:
            return {}
        # Pairs: a manifest sorts its keys, and a log has them in the order of the update.
        metrics = [[name, value] for name, value in self.metrics.items()]
        return {"under_way": {"parts": list(self.parts), "metrics": metrics}}

    def finish(self, part: str, metrics: Mapping[str, float]) -> None:
        """A part has moved its weights."""
        self.parts.append(part)
        self.metrics |= metrics

    def clear(self) -> None:
        """The update is over and recorded."""
        self.parts.clear()
        self.metrics.clear()
