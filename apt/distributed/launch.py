"""What the launcher (torchrun) says about this process in the environment. Needs no torch."""

from __future__ import annotations

import os
import socket

from apt.errors import ConfigError

__all__ = [
    "is_one_of_many",
    "job",
    "launch_rank",
    "launch_world_size",
    "local_rank",
    "restarts",
    "under_torchrun",
]


def launch_rank() -> int:
    """Return RANK: 0 .. world size - 1; 0 without a launcher.

    Raises ConfigError if the variable is not a non-negative integer; so do the functions below.
    """
    return _count("RANK", 0)


def launch_world_size() -> int:
    """Return WORLD_SIZE: the number of processes; 1 without a launcher."""
    return _count("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return LOCAL_RANK: 0 .. processes on this node - 1; 0 without a launcher."""
    return _count("LOCAL_RANK", 0)


def is_one_of_many() -> bool:
    """Return whether a launcher started this process together with others.

    A WORLD_SIZE that is not a number counts as a single process and does not raise, because code
    that reports errors calls this. Joining the ranks then raises.
    """
    value = os.environ.get("WORLD_SIZE", "")
    return value.isdecimal() and int(value) > 1


def under_torchrun() -> bool:
    """Return whether torchrun started this process. It takes any nonzero exit code for a crash."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts() -> int:
    """Return how often torchrun has restarted the ranks. Raises ConfigError like `launch_rank`."""
    return _count("TORCHELASTIC_RESTART_COUNT", 0)


def job() -> str:
    """Return an ID of this torchrun launch, the same on all nodes and after restarts; else "".

    It is the --rdzv-id, or without one, host and process ID of the agent that started this process.
    """
    if not under_torchrun():
        return ""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return f"{socket.gethostname()} {os.getppid()}" if name in ("", "none") else name


def _count(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdecimal():
        raise ConfigError(
            f"the environment has {name}={value!r}, which must be a non-negative integer; start "
            f"with torchrun, or unset {name}"
        )
    return int(value)
