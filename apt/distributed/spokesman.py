"""Report an error to the user from only one of several ranks."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta

import torch.distributed as dist

from apt.distributed.launch import launch_rank, restarts
from apt.distributed.meeting import attempt

__all__ = ["claim", "open_store", "report"]

_PATIENCE = timedelta(seconds=10)


def claim() -> None:
    """Claim the right to report the error that ends this rank, unless another rank has it.

    An error on one rank breaks the collectives of the others, whose own errors then tell nothing;
    and an error on all ranks should be printed once. So the first rank reports, and it claims this
    before it leaves the process group, which makes the others fail.
    """
    store = open_store()
    if store is not None:
        _claims(store)


def report(text: str | None) -> None:
    """Print the error on stderr if this rank reports it, else wait until it has been printed.

    A launcher ends all ranks when the first one exits, so no rank exits before. If the ranks cannot
    reach each other, each prints its own error.

    Args:
        text: the error; None if it came from another rank.
    """
    store = open_store()
    if store is None:
        if text is not None:
            print(text, file=sys.stderr, flush=True)
    elif text is not None and _claims(store):
        print(text, file=sys.stderr, flush=True)
        store.set(_key("said"), "yes")
    else:
        with contextlib.suppress(RuntimeError):  # the rank that reports was killed
            store.wait([_key("said")], _PATIENCE)


def open_store() -> dist.TCPStore | None:
    """Connect to the ranks' store: torchrun's, or rank 0's while it is in the process group.

    Returns None if there is none, or it cannot be reached.
    """
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=_PATIENCE,
            wait_for_workers=False,
        )
    except (KeyError, ValueError, RuntimeError):
        return None


def _claims(store: dist.TCPStore) -> bool:
    rank = str(launch_rank())
    return store.compare_set(_key("word"), "", rank) == rank.encode()


def _key(name: str) -> str:
    # torchrun keeps its store when it restarts the ranks.
    return f"apt/error/{attempt() or restarts()}/{name}"
