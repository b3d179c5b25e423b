"""Ranks forked from one process that has imported torch but computed nothing."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

from apt.distributed.mesh import ParallelConfig
from apt.distributed.parallel import Parallel

WAIT = timedelta(minutes=10)


def gang(world: int, work: Callable[[Parallel], object], layout: ParallelConfig) -> None:
    """Run `work` on several ranks at once, with the environment that torchrun sets.

    Raises RuntimeError if one fails; that rank's own error is then on stderr.
    """
    wait_for(begin(world, work, layout))


def begin(world: int, work: Callable[[Parallel], object], layout: ParallelConfig) -> list[int]:
    """Start the ranks without waiting for them; return their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [_start(rank, shared, work, layout) for rank in range(world)]


def wait_for(children: list[int]) -> None:
    """Wait for ranks that `begin` started. Raises as `gang`."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


def _start(
    rank: int,
    shared: dict[str, str],
    work: Callable[[Parallel], object],
    layout: ParallelConfig,
) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        with Parallel.from_environment("cpu", config=layout, timeout=WAIT) as parallel:
            work(parallel)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
