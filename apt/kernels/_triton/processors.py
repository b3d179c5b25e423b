"""The number of programs that a device runs in parallel, by which launches divide their work."""

from __future__ import annotations

from functools import cache

import torch


@cache
def num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 4 for the interpreter."""
    if device.type != "cuda":
        return 4
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return processors
