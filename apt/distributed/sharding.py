"""Which parameters lie where, and in which type they travel: FSDP2 over the mesh.

In bf16 the linear layers of a block are one unit: their weights are cast to bf16, gathered, and
freed behind the block; gradients are reduced in fp32. That is what autocast computes from fp32
weights, bit for bit, with half the traffic, and nothing is kept in a cache. All else is one fp32
unit, the root's: norms, tables and biases of blocks, embeddings, D's heads. They are small, or read
in fp32, and gathered once for a whole pass.

In fp32 each block is a unit, and what is outside of blocks another.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

__all__ = ["linear_layers", "reduce_gradients", "shard"]

# Autocast still decides what is computed in bf16; inputs of blocks are left as they are.
_HALF = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)
_FULL = MixedPrecisionPolicy(cast_forward_inputs=False)


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    half: bool = False,
    forward_methods: Sequence[str] = (),
) -> None:
    """Shard `module` in place: the weights of each of `blocks` by themselves, then the rest.

    Arguments as in `Parallel.shard`.
    """
    # It fears in-place operations on what a block returns; ours makes none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    units = [(linear_layers(block) if half else []) or [block] for block in blocks]
    for number, unit in enumerate(units, start=1):
        halved = half and all(type(layer) is nn.Linear for layer in unit)
        fully_shard(
            unit if halved else unit[0],
            mesh=mesh,
            mp_policy=_HALF if halved else _FULL,
            # The backward pass begins with the last one.
            reshard_after_forward=number < len(units),
        )
    fully_shard(module, mesh=mesh, mp_policy=_FULL)
    # Blocks may be computed again in the backward pass. A prefetch in forward order, or FSDP's own,
    # by what ran last, would then gather the block that is just done with, and hold it until the
    # next pass. The first block, with none before it, asks for itself, which does nothing.
    sharded = [_sharded(unit[0]) for unit in units]
    for before, this in itertools.pairwise([*sharded[:1], *sharded]):
        this.set_modules_to_backward_prefetch([before])
    for name in forward_methods:
        register_fsdp_forward_method(module, name)


def linear_layers(block: nn.Module) -> list[nn.Module]:
    """The layers of a block that autocast computes in bf16: plain linear ones."""
    return [layer for layer in block.modules() if type(layer) is nn.Linear]


def reduce_gradients(module: nn.Module, *, last: bool, once: bool) -> None:
    """How the next backward pass reduces gradients; nothing for a module that is not sharded.

    Args:
        last: it is the update's last one.
        once: only the last one reduces; before it each rank adds up whole gradients. Otherwise each
            scatters its sums, and the last one averages them between copies.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last or not once)
        module.set_requires_all_reduce(last)


def _sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
