"""Ranks that die, are stopped or hang while another one waits for them; test_watch.py runs this.

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
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from apt.distributed.parallel import Parallel
from apt.distributed.watch import watched
from apt.errors import LostRankError

TIMEOUT = timedelta(seconds=10)
PULSE = 0.5


def hang() -> None:
    threading.Event().wait()


FAULTS: dict[str, Callable[[], None]] = {
    "hangs": hang,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def rank_of(fault: str, rank: int, port: int, file: Path) -> None:
    """Two ranks meet once; then rank 1 has the fault, and rank 0 writes down what it hears."""
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


def start(fault: str, rank: int, port: int, file: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        rank_of(fault, rank, port, file)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


def main(folder: Path) -> None:
    pairs: list[tuple[int, int]] = []
    for fault in FAULTS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        file = folder / fault
        pairs.append((start(fault, 0, port, file), start(fault, 1, port, folder / "lost")))
    for survivor, lost in pairs:
        os.waitpid(survivor, 0)
        os.kill(lost, signal.SIGKILL)
        os.waitpid(lost, 0)
    print(json.dumps({fault: (folder / fault).read_text() for fault in FAULTS}))
