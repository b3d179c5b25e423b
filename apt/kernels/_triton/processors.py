"""How much a device runs side by side, by which launches share out their work."""

from __future__ import annotations

from functools import cache

import torch


@cache
def num_processors(device: torch.device) -> int:
    """Programs that a device runs side by side; the interpreter shares out as if it had 4."""
    if device.type != "cuda":
        return 4
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return processors
