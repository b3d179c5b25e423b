"""The last collectives of this rank, from torch's flight recorder of gloo and NCCL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["last_collective", "record_collectives"]


def record_collectives(folder: Path | None = None) -> None:
    """Have torch keep the last collectives, and NCCL write them to files after a timeout.

    Call it before the process group is made. Variables that are already set are kept.

    Args:
        folder: for one file per rank (`rank_0`, ...); None leaves the place to torch.
    """
    kept = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        kept["TORCH_FR_DUMP_TEMP_FILE"] = str(folder.absolute() / "rank_")
    for name, value in kept.items():
        os.environ.setdefault(name, value)


def last_collective() -> str:
    """Return the newest collective that this rank began; empty if none is recorded.

    For example "all_reduce 12 of default_pg", the twelfth collective of that group.
    """
    entries = [entry for dump in _dumps() for entry in json.loads(dump()).get("entries", ())]
    if not entries:
        return ""
    newest = max(entries, key=lambda entry: entry["time_created_ns"])
    name = str(newest["profiling_name"]).rpartition(":")[2]
    return f"{name} {newest['collective_seq_id']} of {newest['process_group'][-1]}"


def _dumps() -> list[Callable[[], bytes]]:
    """Return the dump function of each recorder that this build of torch has."""
    module: Any = getattr(torch._C, "_distributed_c10d", None)
    names = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    return [getattr(module, name) for name in names if hasattr(module, name)]
