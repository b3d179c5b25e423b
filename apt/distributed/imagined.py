"""Ranks that are not there: one process takes rank 0's place among any number of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from apt.distributed.mesh import Layout, RankMesh
from apt.distributed.parallel import Parallel
from apt.errors import InputError

__all__ = ["imagined_ranks"]


@contextmanager
def imagined_ranks(layout: Layout) -> Iterator[Parallel]:
    """Rank 0 of a layout of ranks, on the CPU, in this process alone.

    Collectives return at once and leave what they were given, so results mean nothing; shapes,
    memory and what would be sent are those of real ranks.

    Raises InputError if this process already is one of several ranks.
    """
    here = torch.device("cpu")
    if layout.world_size == 1:
        yield Parallel(rank=0, world_size=1, device=here, mesh=None)
        return
    if dist.is_initialized():
        raise InputError("ranks are imagined in a process of their own: run it without torchrun")
    # Importing it registers torch's backend "fake".
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    try:
        mesh = RankMesh(layout, here.type)
        # Now, while there are tensors with data, which a mesh is made with.
        assert mesh.states.ndim and mesh.samples.ndim
        yield Parallel(0, layout.world_size, here, mesh)
    finally:
        dist.destroy_process_group()
