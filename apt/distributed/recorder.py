"""What the process groups of this rank did last: torch's flight recorder, of gloo and of NCCL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["last_collective", "record_collectives"]


def record_collectives(folder: Path | None = None) -> None:
    """Have the last collectives kept, and NCCL write them down when one takes too long.

    Before the process group is made. What the environment says already holds.

    Args:
        folder: for one file of each rank, `rank_0` and so on; None leaves the place to torch.
    """
    kept = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        kept["TORCH_FR_DUMP_TEMP_FILE"] = str(folder.absolute() / "rank_")
    for name, value in kept.items():
        os.environ.setdefault(name, value)


def last_collective() -> str:
    """The newest one that was begun here, such as "all_reduce 12 of default_pg", which is the
    twelfth of that group; empty if nothing is recorded."""
    entries = [entry for dump in _dumps() for entry in json.loads(dump()).get("entries", ())]
    if not entries:
        return ""
    newest = max(entries, key=lambda entry: entry["time_created_ns"])
    name = str(newest["profiling_name"]).rpartition(":")[2]
    return f"{name} {newest['collective_seq_id']} of {newest['process_group'][-1]}"


def _dumps() -> list[Callable[[], bytes]]:
    """Of each recorder that this build of torch has."""
    module: Any = getattr(torch._C, "_distributed_c10d", None)
    names = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    return [getattr(module, name) for name in names if hasattr(module, name)]
