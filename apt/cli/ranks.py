"""Ranks started by torchrun, for commands that divide samples among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from apt.distributed.launch import is_one_of_many

if TYPE_CHECKING:
    from apt.distributed.parallel import Parallel

_PATIENCE = timedelta(days=7)
"""Timeout for waiting for the slowest rank, whose samples may take long."""


@contextmanager
def ranks(device: str | None = None) -> Iterator[Parallel | None]:
    """Yield the ranks that share an evaluation; None if this is the only process."""
    if not is_one_of_many():
        yield None
        return
    from apt.distributed.parallel import Parallel

    with Parallel.from_environment(device or "auto", timeout=_PATIENCE) as parallel:
        yield parallel
