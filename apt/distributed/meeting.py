"""Ranks come together, also after torchrun has started them again."""

from __future__ import annotations

import json
import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from apt.distributed.launch import launch_rank, launch_world_size

__all__ = ["attempt", "join"]

_PAUSE = 0.2

_attempt = ""


def attempt() -> str:
    """What all ranks that were started together call this start; empty before they have met."""
    return _attempt


def join(backend: str, timeout: timedelta) -> None:
    """Make the process group of the ranks that the launcher describes.

    torchrun's agents keep one store for all attempts, and PyTorch looks up the addresses of ranks
    there by keys that do not tell attempts apart, so ranks that were started again may connect to
    those that are dead (torch 2.13). Agents count restarts each by itself, so the ranks agree on
    a name for this attempt first, under which the group then has its keys.

    Args:
        backend: of `init_process_group`.
        timeout: of its collectives, and for all ranks to be there.

    Raises:
        torch.distributed.DistError: ranks are missing.
    """
    global _attempt
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, world_size = launch_rank(), launch_world_size()
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=False,
        timeout=timeout,
    )
    _attempt = _meet(store, rank, world_size, timeout)
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=dist.PrefixStore(f"apt/{_attempt}", store),
        rank=rank,
        world_size=world_size,
    )


def _meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """The name that rank 0 has drawn for this attempt; other names in the store are older.

    Every rank answers rank 0's invitation with a name of its own, and knows by its own name in what
    rank 0 says then that the invitation was not of an earlier attempt.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set("apt/invitation", mine)
        answers = [f"apt/answer/{mine}/{other}" for other in range(1, world_size)]
        store.wait(answers, timeout)
        store.set(f"apt/met/{mine}", json.dumps([store.get(key).decode() for key in answers]))
        return mine
    deadline = time.monotonic() + timeout.total_seconds()
    answered = ""
    while True:
        invitation = store.get("apt/invitation").decode()
        if invitation != answered:
            store.set(f"apt/answer/{invitation}/{rank}", mine)
            answered = invitation
        met = f"apt/met/{invitation}"
        if store.check([met]) and mine in json.loads(store.get(met)):
            return invitation
        if time.monotonic() > deadline:
            raise dist.DistStoreError(
                f"rank {rank} has waited {timeout} for rank 0, or for others that rank 0 waits for"
            )
        time.sleep(_PAUSE)
