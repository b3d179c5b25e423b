"""Ranks that die, are stopped or hang while another one waits for them; test_watch.py runs this.

On two GPUs one rank waits for the other inside NCCL, whose watchdog ends it.

Forked from one process, so that torch is imported once, and all at the same time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from apt.distributed.parallel import Parallel
from apt.distributed.watch import watched
from apt.errors import LostRankError

TIMEOUT = timedelta(seconds=10)
PULSE = 0.5


def hang() -> None:
    threading.Event().wait()


FAULTS: dict[str, Callable[[], None]] = {
    "hangs": hang,
    "hangs_in_nccl": hang,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def rank_of(fault: str, rank: int, port: int, file: Path) -> None:
    """Two ranks meet once; then rank 1 fails, and rank 0 records what it hears."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    parallel = Parallel.from_environment("cpu", timeout=TIMEOUT)
    heard = "nothing"
    try:
        with watched(rank, 2, lambda: f"at step {1 + rank}", pulse=PULSE):
            assert parallel.any(rank == 1)
            if rank == 1:
                FAULTS[fault]()
            parallel.barrier()
    except LostRankError as error:
        heard = str(error)
    file.write_text(heard)


def kernel_of(fault: str, rank: int, port: int, file: Path) -> None:
    """Two GPUs meet once; then rank 0 sums with rank 1, which does something else."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    records = file.parent / "collectives"
    parallel = Parallel.from_environment("cuda", timeout=TIMEOUT, records=records)
    ones = torch.ones(4, device=parallel.device)
    dist.all_reduce(ones)
    torch.cuda.synchronize()
    if rank == 1:
        FAULTS[fault]()
    dist.all_reduce(ones)
    torch.cuda.synchronize()


def start(fault: str, rank: int, port: int, file: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        (kernel_of if fault == "hangs_in_nccl" else rank_of)(fault, rank, port, file)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


def main(folder: Path, faults: Sequence[str]) -> None:
    pairs: list[tuple[int, int]] = []
    for fault in faults:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        file = folder / fault
        pairs.append((start(fault, 0, port, file), start(fault, 1, port, folder / "lost")))
    for survivor, lost in pairs:
        os.waitpid(survivor, 0)
        os.kill(lost, signal.SIGKILL)
        os.waitpid(lost, 0)
    heard = {fault: folder / fault for fault in faults}
    print(json.dumps({fault: file.read_text() for fault, file in heard.items() if file.exists()}))
