"""FSDP2 over the mesh: which parameters are gathered together, and in which dtype.

In bf16, the linear layers of a block are one unit. Their weights are cast to bf16, gathered, and
freed after the block; gradients are reduced in fp32. The result is bit for bit what autocast
computes from fp32 weights, with half the traffic and without autocast's cache. Everything else is
in one fp32 unit, that of the root: norms, tables and biases of blocks, embeddings, D's heads. These
are small, or used in fp32, and are gathered once per pass.

In fp32, each block is a unit, and everything outside the blocks is another.
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

# Autocast still decides what is computed in bf16; inputs of blocks are not cast.
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
    """Shard `module` in place: the weights of each of `blocks` separately, then the rest.

    The arguments are those of `Parallel.shard`.
    """
    # FSDP2 warns of in-place operations on a block's outputs, but our models do none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    units = [(linear_layers(block) if half else []) or [block] for block in blocks]
    for number, unit in enumerate(units, start=1):
        halved = half and all(type(layer) is nn.Linear for layer in unit)
        fully_shard(
            unit if halved else unit[0],
            mesh=mesh,
            mp_policy=_HALF if halved else _FULL,
            # The backward pass begins with the last block, so keep that one gathered.
            reshard_after_forward=number < len(units),
        )
    fully_shard(module, mesh=mesh, mp_policy=_FULL)
    # With checkpointing, the backward pass recomputes blocks. Prefetching in forward order, or by
    # FSDP's record of what ran last, would then gather the block that has just finished, and hold
    # it until the next pass. The first block prefetches itself, which does nothing.
    sharded = [_sharded(unit[0]) for unit in units]
    for before, this in itertools.pairwise([*sharded[:1], *sharded]):
        this.set_modules_to_backward_prefetch([before])
    for name in forward_methods:
        register_fsdp_forward_method(module, name)


def linear_layers(block: nn.Module) -> list[nn.Module]:
    """Return the layers of a block that autocast computes in bf16: the plain linear ones."""
    return [layer for layer in block.modules() if type(layer) is nn.Linear]


def reduce_gradients(module: nn.Module, *, last: bool, once: bool) -> None:
    """Set how the next backward pass reduces gradients; does nothing for an unsharded module.

    Args:
        last: whether it is the update's last backward pass.
        once: only the last pass reduces, and until then each rank adds up whole gradients.
            Otherwise each pass reduce-scatters, and only the last one averages between copies.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last or not once)
        module.set_requires_all_reduce(last)


def _sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
