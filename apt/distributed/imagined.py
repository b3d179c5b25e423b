"""Simulated ranks: one process acts as rank 0 of any number of ranks."""

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
    """Act as rank 0 of a layout of ranks, on the CPU and in this process alone.

    Collectives return at once and leave their inputs as they are, so results are meaningless; but
    shapes, memory and traffic are those of real ranks.

    Raises InputError if this process already belongs to a process group.
    """
    here = torch.device("cpu")
    if layout.world_size == 1:
        yield Parallel(rank=0, world_size=1, device=here, mesh=None)
        return
    if dist.is_initialized():
        raise InputError("this command simulates ranks in one process: run it without torchrun")
    # The import registers torch's "fake" backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    try:
        mesh = RankMesh(layout, here.type)
        # Make the meshes now, while tensors still have data: making a mesh needs them.
        assert mesh.states.ndim and mesh.samples.ndim
        yield Parallel(0, layout.world_size, here, mesh)
    finally:
        dist.destroy_process_group()
