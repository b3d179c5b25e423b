"""One of several ranks tells the user of an error; the others keep silent."""

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
    """Take the word for the error that ends this rank, unless another rank has it.

    An error on one rank breaks the collectives of the others, whose own errors say nothing; and an
    error on all ranks is one error. So the first rank has the word, and it asks for it before it
    leaves the process group and lets the others down.
    """
    store = open_store()
    if store is not None:
        _claims(store)


def report(text: str | None) -> None:
    """Print the error on stderr if this rank has the word, else wait until it has been said.

    A launcher ends all ranks when the first one has gone, so nobody goes before. Where the ranks
    cannot reach each other, each prints.

    Args:
        text: None if the error is another rank's.
    """
    store = open_store()
    if store is None:
        if text is not None:
            print(text, file=sys.stderr, flush=True)
    elif text is not None and _claims(store):
        print(text, file=sys.stderr, flush=True)
        store.set(_key("said"), "yes")
    else:
        with contextlib.suppress(RuntimeError):  # whoever has the word was killed
            store.wait([_key("said")], _PATIENCE)


def open_store() -> dist.TCPStore | None:
    """What the ranks share: torchrun's, or rank 0's for as long as it is in the process group."""
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
    # torchrun keeps its store when it starts the ranks again.
    return f"apt/error/{attempt() or restarts()}/{name}"
