"""How the ranks of a run are laid out: copies of the weights, shards of a copy, parts of a sample.

    ranks = replicate x shard x sequence          rank = (copy * shard + part) * sequence + slice

The `sequence` ranks of a group are neighbours, so they lie on one node where that is possible. They
work on the same samples, each on its slice of the tokens; `replicate x shard` groups of them, the
data ranks, have samples of their own. States (weights, gradients, averages, moments) are sharded
over all `shard x sequence` ranks of a copy, and gradients averaged over all ranks.

That average is the right one for slices too, if what crosses ranks is differentiated as what it is:
the gradient of an all-to-all is an all-to-all, that of a sum over ranks is a sum over ranks. A
rank's loss may then be the mean over its slice, or the same whole loss on each rank of a group; the
mean of the losses over all ranks is what is differentiated.
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
    """How ranks share the work: replicate x shard x sequence is their number.

    Attributes:
        replicate: copies of the weights, whose gradients are averaged between them (HSDP): one for
            each node keeps the gathering of weights inside nodes.
        shard: ranks with samples of their own that share one copy; 0 takes all that are left.
        sequence: ranks that share the tokens of each sample, and the copy too.
        reduce_once: add up the gradients of micro-batches on each rank, and reduce them at the
            update's last one. Saves a reduction per micro-batch, and takes 4 bytes for each
            parameter of the network that trains, on each rank. Between copies gradients are
            averaged once in any case.
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
        """The layout of so many ranks. Raises ConfigError if the sizes do not multiply to them."""
        fixed = self.replicate * self.sequence
        shard = self.shard or world_size // fixed
        if shard < 1 or fixed * shard != world_size:
            sizes = f"replicate {self.replicate} x shard {self.shard or 'the rest'} x sequence "
            raise ConfigError(
                f"--parallel: {sizes}{self.sequence} does not make {world_size} "
                f"rank{'s' if world_size > 1 else ''}; choose sizes whose product is that, or "
                f"start {fixed * max(self.shard, 1)}"
            )
        return Layout(self.replicate, shard, self.sequence)


@dataclass(frozen=True)
class Layout:
    """Sizes that multiply to the number of ranks; see `ParallelConfig`."""

    replicate: int = 1
    shard: int = 1
    sequence: int = 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.replicate * self.shard * self.sequence

    @property
    def states(self) -> int:
        """Ranks that one copy of the weights is sharded over."""
        return self.shard * self.sequence

    @property
    def data(self) -> int:
        """Groups of ranks that have samples of their own."""
        return self.replicate * self.shard

    def data_rank(self, rank: int) -> int:
        """Which of the `data` groups a rank belongs to."""
        return rank // self.sequence

    def __str__(self) -> str:
        return f"replicate {self.replicate} x shard {self.shard} x sequence {self.sequence}"


@dataclass(frozen=True)
class RankMesh:
    """The groups of several ranks. Every rank must make it, and ask for the same groups.

    Attributes:
        layout: of all ranks of the process group.
        device_type: "cpu" or "cuda".
    """

    layout: Layout
    device_type: str

    @cached_property
    def states(self) -> DeviceMesh:
        """What FSDP shards over: ("states",), or ("replicate", "states") of several copies."""
        if self.layout.replicate == 1:
            return init_device_mesh(
                self.device_type, (self.layout.states,), mesh_dim_names=("states",)
            )
        sizes = self.layout.replicate, self.layout.states
        return init_device_mesh(self.device_type, sizes, mesh_dim_names=("replicate", "states"))

    @cached_property
    def samples(self) -> DeviceMesh:
        """("data", "sequence"): which ranks have samples of their own, and which share them."""
        sizes = self.layout.data, self.layout.sequence
        return init_device_mesh(self.device_type, sizes, mesh_dim_names=("data", "sequence"))

    def group(self, name: GroupName) -> dist.ProcessGroup | None:
        """This rank's group of a name; None if it would be alone in it."""
        if getattr(self.layout, name) == 1:
            return None
        mesh = self.states if name in ("replicate", "states") else self.samples
        return mesh[name].get_group() if mesh.ndim > 1 else mesh.get_group()
