"""The device of a rank."""

from __future__ import annotations

import torch

from apt.distributed.launch import local_rank
from apt.errors import ConfigError

__all__ = ["pick_device"]


def pick_device(device: str = "auto") -> torch.device:
    """Return this process's device; a GPU also becomes the current CUDA device.

    Args:
        device: `"auto"` (a GPU if there is one), `"cpu"` or `"cuda"`.

    Raises:
        ConfigError: the device is unknown, `"cuda"` is not available, or there are fewer GPUs than
            local ranks.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not one of 'auto', 'cpu', 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was requested, but PyTorch sees no GPU; use 'cpu'.")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = local_rank()
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {index} has no GPU of its own: this node has only "
            f"{torch.cuda.device_count()}. Start torchrun with fewer processes per node."
        )
    here = torch.device("cuda", index)
    torch.cuda.set_device(here)
    return here
