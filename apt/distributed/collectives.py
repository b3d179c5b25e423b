"""Actions that all ranks take together, and that succeed on all or fail on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from apt.errors import CheckpointError

__all__ = ["everywhere", "group_size", "rank", "reason", "world"]

T = TypeVar("T")


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if _distributed() else 0


def world() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if _distributed() else 1


def group_size(group: Any) -> int | None:
    """How many ranks are in a group, as an op of torch is given it; None for anything else."""
    if isinstance(group, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(group).size()
        except (RuntimeError, TypeError):
            return None  # another object of torch, such as the kind of a reduction
    if isinstance(group, str):
        try:
            return dist.distributed_c10d._resolve_process_group(group).size()
        except (RuntimeError, LookupError):
            return None
    return None


def everywhere(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank; return all results, or raise on all ranks if one failed.

    Raises:
        CheckpointError: for an OSError or a CheckpointError on any rank.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = action()
    except (OSError, CheckpointError) as error:
        problem = reason(error)
    outcomes: list[Any] = [(result, problem)]
    if world() > 1:
        outcomes = [None] * world()
        dist.all_gather_object(outcomes, (result, problem))
    problems = list(dict.fromkeys(p for _, p in outcomes if p is not None))
    if problems:
        raise CheckpointError("; ".join(problems))
    return [r for r, _ in outcomes]


def reason(error: BaseException) -> str:
    """What went wrong, with the file if the system names it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
