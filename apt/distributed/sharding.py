"""Which parameters lie where: FSDP2 over the mesh."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

__all__ = ["shard"]


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    forward_methods: Sequence[str] = (),
) -> None:
    """Shard `module` in place: each of `blocks` by itself, then the rest.

    Arguments as in `Parallel.shard`.
    """
    # It fears in-place operations on what a block returns; ours makes none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in forward_methods:
        register_fsdp_forward_method(module, name)
