"""The layout of a run's ranks: copies of the weights, shards of a copy, slices of a sample.

    ranks = replicate x shard x sequence          rank = (copy * shard + part) * sequence + slice

The `sequence` ranks of a group are neighbours, so they share a node where possible. They work on
the same samples, each on its slice of the tokens. The `replicate x shard` groups, the data ranks,
each have their own samples. States (weights, gradients, averages, moments) are sharded over all
`shard x sequence` ranks of a copy, and gradients are averaged over all ranks.

This average is also correct for slices, provided that collectives have their true gradients: that
of an all-to-all is an all-to-all, that of a sum over ranks is a sum over ranks. A rank's loss may
then be the mean over its slice, or the same whole loss on each rank of a group. The gradient is
that of the mean of the losses over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from apt.errors import ConfigError

__all__ = ["GroupName", "Layout", "ParallelConfig", "RankMesh"]

GroupName = Literal["replicate", "states", "data", "sequence"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work; replicate x shard x sequence must be their number.

    Attributes:
        replicate: copies of the weights, between which gradients are averaged (HSDP). With one copy
            per node, weights are gathered only within nodes.
        shard: ranks that share one copy and each have their own samples; 0 takes all remaining
            ranks.
        sequence: ranks that share the tokens of each sample, and also the copy.
        reduce_once: add up the gradients of an update's micro-batches on each rank, and reduce them
            once, after the last one. This saves one reduction per micro-batch, but takes 4 bytes
            per parameter of the network that trains on each rank. Between copies, gradients are
            always averaged only once per update.
    """

    replicate: int = 1
    shard: int = 0
    sequence: int = 1
    reduce_once: bool = False

    def __post_init__(self) -> None:
        for name, least in (("replicate", 1), ("shard", 0), ("sequence", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"parallel.{name} must be at least {least}, got {getattr(self, name)}"
                )

    def layout(self, world_size: int) -> Layout:
        """Return the layout of `world_size` ranks. Raises ConfigError if the sizes do not fit."""
        fixed = self.replicate * self.sequence
        shard = self.shard or world_size // fixed
        if shard < 1 or fixed * shard != world_size:
            sizes = f"replicate {self.replicate} x shard {self.shard or 'the rest'} x sequence "
            raise ConfigError(
                f"--parallel: {sizes}{self.sequence} does not fit {world_size} "
                f"rank{'s' if world_size > 1 else ''}; choose sizes whose product is the number "
                f"of ranks, or start {fixed * max(self.shard, 1)}"
            )
        return Layout(self.replicate, shard, self.sequence)


@dataclass(frozen=True)
class Layout:
    """Sizes whose product is the number of ranks; see `ParallelConfig`."""

    replicate: int = 1
    shard: int = 1
    sequence: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.replicate * self.shard * self.sequence

    @property
    def states(self) -> int:
        """Number of ranks over which one copy of the weights is sharded."""
        return self.shard * self.sequence

    @property
    def data(self) -> int:
        """Number of groups of ranks that each have their own samples."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Return which of the `data` groups a rank belongs to."""
        return rank // self.sequence

    def __str__(self) -> str:
        return f"replicate {self.replicate} x shard {self.shard} x sequence {self.sequence}"


@dataclass(frozen=True)
class RankMesh:
    """The process groups of a layout. Every rank must make it, and request the same groups.

    Attributes:
        layout: the layout of all ranks of the process group.
        device_type: "cpu" or "cuda".
    """

    layout: Layout
    device_type: str

    @cached_property
    def states(self) -> DeviceMesh:
        """The mesh that FSDP shards over: ("states",), or ("replicate", "states") with copies."""
        if self.layout.replicate == 1:
            return init_device_mesh(
                self.device_type, (self.layout.states,), mesh_dim_names=("states",)
            )
        sizes = self.layout.replicate, self.layout.states
        return init_device_mesh(self.device_type, sizes, mesh_dim_names=("replicate", "states"))

    @cached_property
    def samples(self) -> DeviceMesh:
        """("data", "sequence"): which ranks have their own samples, and which share them."""
        sizes = self.layout.data, self.layout.sequence
        return init_device_mesh(self.device_type, sizes, mesh_dim_names=("data", "sequence"))

    def group(self, name: GroupName) -> dist.ProcessGroup | None:
        """Return this rank's group of that name; None if the rank would be alone in it."""
        if getattr(self.layout, name) == 1:
            return None
        mesh = self.states if name in ("replicate", "states") else self.samples
        return mesh[name].get_group() if mesh.ndim > 1 else mesh.get_group()
