"""Actions that all ranks take together, and that either succeed or fail on all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from apt.errors import CheckpointError

__all__ = ["everywhere", "group", "group_ranks", "own_group", "rank", "reason", "world"]

T = TypeVar("T")

_thread = threading.local()


@contextmanager
def own_group(timeout: timedelta | None = None) -> Iterator[Callable[[Callable[[], T]], T]]:
    """Make a second process group, for a thread that works while the main thread trains.

    Yields a function that runs an action. Collectives of this module, and of code that uses it, go
    through this group during the action, so they cannot mix with those of other threads.

    Collective: every rank must enter it.
    """
    made = dist.new_group(backend="gloo", timeout=timeout) if world() > 1 else None

    def run(action: Callable[[], T]) -> T:
        _thread.group = made
        try:
            return action()
        finally:
            _thread.group = None

    try:
        yield run
    finally:
        if made is not None and dist.is_initialized():
            dist.destroy_process_group(made)


def group() -> dist.ProcessGroup | None:
    """Return the process group of this thread's collectives; None is the default group."""
    return getattr(_thread, "group", None)


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if _distributed() else 0


def world() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if _distributed() else 1


def group_ranks(group: Any) -> list[int] | None:
    """Return the ranks of a process group that was passed to a torch op; None for other objects."""
    if isinstance(group, torch.ScriptObject):
        try:
            return dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        except (RuntimeError, TypeError):
            return None  # another torch object, such as a reduction op
    if isinstance(group, str):
        try:
            found = dist.distributed_c10d._resolve_process_group(cast(Any, group))
        except (RuntimeError, LookupError):
            return None
        return dist.get_process_group_ranks(found)
    return None


def everywhere(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank. Return all results, or raise on all ranks if one failed.

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
        dist.all_gather_object(outcomes, (result, problem), group=group())
    problems = list(dict.fromkeys(p for _, p in outcomes if p is not None))
    if problems:
        raise CheckpointError("; ".join(problems))
    return [r for r, _ in outcomes]


def reason(error: BaseException) -> str:
    """Return what went wrong, with the file if the operating system names one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
