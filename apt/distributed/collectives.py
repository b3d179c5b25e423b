"""Actions that all ranks take together, and that succeed on all or fail on all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from apt.errors import CheckpointError

__all__ = ["everywhere", "group", "group_size", "own_group", "rank", "reason", "world"]

T = TypeVar("T")

_thread = threading.local()


@contextmanager
def own_group(timeout: timedelta | None = None) -> Iterator[Callable[[Callable[[], T]], T]]:
    """A process group beside the usual one, for a thread that works while this one trains.

    Gives a function that runs an action so that its collectives, those of this module and of what
    is built on it, meet the same thread's on other ranks and no others. Every rank must enter it.
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
    """The process group of this thread's collectives; None is the usual one."""
    return getattr(_thread, "group", None)


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
            return dist.distributed_c10d._resolve_process_group(cast(Any, group)).size()
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
        dist.all_gather_object(outcomes, (result, problem), group=group())
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
