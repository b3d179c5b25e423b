"""Join the ranks into a process group, also after torchrun has restarted them."""

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
    """Return the name of this start, the same on all ranks; empty before they have met."""
    return _attempt


def join(backend: str, timeout: timedelta) -> None:
    """Join the process group that the launcher describes.

    torchrun's agents keep one store for all attempts, and PyTorch looks up the addresses of ranks
    there by keys that are the same for all attempts. Restarted ranks may therefore connect to dead
    ones (torch 2.13). Each agent counts restarts by itself, so the counts may differ. The ranks
    therefore first agree on a name for this attempt, which then prefixes the group's keys.

    Args:
        backend: for `init_process_group`.
        timeout: for its collectives, and for all ranks to arrive.

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
    """Return the name that rank 0 drew for this attempt; the store may also hold older names.

    Every rank answers rank 0's invitation with a random name. Rank 0 then publishes all answers.
    A rank that finds its own answer there knows that the invitation is from this attempt.
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
                f"rank {rank} has waited {timeout} for rank 0, or for ranks that rank 0 waits for"
            )
        time.sleep(_PAUSE)
