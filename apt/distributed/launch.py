"""What the launcher says of this process, as torchrun does in the environment; needs no torch."""

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
    """RANK: 0 .. world size - 1; 0 without a launcher. Raises ConfigError if it is no count."""
    return _count("RANK", 0)


def launch_world_size() -> int:
    """WORLD_SIZE: number of processes; 1 without a launcher. Raises ConfigError likewise."""
    return _count("WORLD_SIZE", 1)


def local_rank() -> int:
    """LOCAL_RANK: 0 .. processes on this node - 1; 0 without a launcher. Raises likewise."""
    return _count("LOCAL_RANK", 0)


def is_one_of_many() -> bool:
    """Whether a launcher started this process beside others.

    What is no number counts as alone here: error messages depend on it, and those who join the
    ranks say what is wrong with it.
    """
    value = os.environ.get("WORLD_SIZE", "")
    return value.isdecimal() and int(value) > 1


def under_torchrun() -> bool:
    """Whether torchrun started this process, which takes any exit code except 0 for a crash."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts() -> int:
    """How often torchrun has started the ranks again. Raises likewise."""
    return _count("TORCHELASTIC_RESTART_COUNT", 0)


def job() -> str:
    """What names this launch of torchrun on all its nodes and in all its restarts; else empty.

    Its --rdzv-id; without one, the agent that started this process.
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
            f"the environment has {name}={value!r}, which is no number of a launcher; start with "
            f"torchrun, or unset {name}"
        )
    return int(value)
