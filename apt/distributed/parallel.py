"""Ranks, devices and sharding: PyTorch's own tools, with one process as the special case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apt.distributed.collectives import group, own_group
from apt.distributed.device import pick_device
from apt.distributed.launch import launch_rank, launch_world_size
from apt.distributed.meeting import join
from apt.distributed.mesh import GroupName, Layout, ParallelConfig, RankMesh
from apt.distributed.recorder import record_collectives
from apt.distributed.sequence import SequenceGroup
from apt.distributed.sharding import shard
from apt.distributed.spokesman import claim
from apt.errors import PeerError

__all__ = ["FromMain", "Parallel", "made_here"]

T = TypeVar("T")

FromMain = Callable[[Callable[[], Any]], Any]
"""`Parallel.from_main`, or `made_here` where there are no ranks."""


def made_here(make: Callable[[], T]) -> T:
    """Return what `make` returns."""
    return make()


# Rank 0 may have to read the headers of a million files.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Parallel:
    """This process's place among the ranks of a run.

    Make it with `from_environment`; close it at the end, or use it as a context manager.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        device: where this rank computes.
        mesh: the layout of the ranks; None with a single process.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: RankMesh | None

    @classmethod
    def from_environment(
        cls,
        device: str = "auto",
        *,
        config: ParallelConfig | None = None,
        timeout: timedelta = timedelta(minutes=10),
        records: Path | None = None,
    ) -> Parallel:
        """Join the process group that `torchrun` describes, or run as a single process without it.

        Args:
            device: `"auto"` (a GPU if there is one), `"cpu"` or `"cuda"`.
            config: the layout of the ranks; None shards over all of them.
            timeout: how long a collective waits for the slowest rank.
            records: a folder where ranks on GPUs write their last collectives after a timeout.

        Raises:
            ConfigError: see `pick_device`; the launcher's variables are not numbers; the layout
                does not fit the number of ranks.
        """
        here = pick_device(device)
        rank, world_size = launch_rank(), launch_world_size()
        layout = (config or ParallelConfig()).layout(world_size)
        if world_size == 1:
            return cls(rank=0, world_size=1, device=here, mesh=None)
        # Gloo is needed on GPUs too, for the small CPU tensors and objects of logs and checkpoints.
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        record_collectives(records if here.type == "cuda" else None)
        join(backend, timeout)
        return cls(rank, world_size, here, RankMesh(layout, here.type))

    def laid_out(self, config: ParallelConfig) -> Parallel:
        """Return the same ranks in another layout. Raises ConfigError if it does not fit them."""
        layout = config.layout(self.world_size)
        if self.mesh is None or layout == self.layout:
            return self
        return replace(self, mesh=RankMesh(layout, self.device.type))

    @property
    def layout(self) -> Layout:
        """The layout of the ranks; all sizes are 1 with a single process."""
        return Layout() if self.mesh is None else self.mesh.layout

    @property
    def data_rank(self) -> int:
        """0 .. data_size - 1; ranks with the same number have the same samples."""
        return self.layout.data_rank(self.rank)

    @property
    def data_size(self) -> int:
        """Number of ranks, or groups of ranks, that each have their own samples."""
        return 1 if self.mesh is None else self.layout.data

    def group(self, name: GroupName) -> dist.ProcessGroup | None:
        """Return this rank's group of that name; None if it is alone. Collective the first time."""
        return None if self.mesh is None else self.mesh.group(name)

    @property
    def sequence(self) -> SequenceGroup | None:
        """The ranks that share the tokens of this rank's samples; None if no others do."""
        group = self.group("sequence")
        return None if group is None else SequenceGroup.of(group)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes logs and samples."""
        return self.rank == 0

    def shard(
        self,
        module: nn.Module,
        blocks: Iterable[nn.Module],
        *,
        half: bool = False,
        forward_methods: Sequence[str] = (),
    ) -> None:
        """Shard `module` in place with FSDP2: each of `blocks` by itself, then the rest.

        Does nothing with a single process. Parameters become DTensors, so create optimisers and
        EMAs after this call.

        Args:
            module: the root module, already on `device`, or on the meta device.
            blocks: the repeated layers inside it.
            half: gather the linear layers of blocks in bf16, for training under autocast.
            forward_methods: other methods of `module` that compute with its weights (such as
                `"hidden_states"`); FSDP gathers parameters only around methods that it knows.
        """
        if self.mesh is not None:
            shard(module, blocks, self.mesh.states, half=half, forward_methods=forward_methods)

    def mean(self, values: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Return averages of scalars over the ranks, in float64 and the same on every rank.

        Each rank counts once, also within a sequence group, whose ranks have the same values or
        parts of them.

        Args:
            values: the same keys on every rank, in any order.
        """
        keys = sorted(values)
        scalars = [float(values[key]) for key in keys]
        if self.world_size > 1 and keys:
            total = torch.tensor(scalars, dtype=torch.float64)
            dist.all_reduce(total)
            scalars = (total / self.world_size).tolist()
        averaged = dict(zip(keys, scalars, strict=True))
        return {key: averaged[key] for key in values}

    def of_each(self, value: float) -> list[float]:
        """Return the value of each rank, in rank order. Collective."""
        if self.world_size == 1:
            return [value]
        found = torch.zeros(self.world_size, dtype=torch.float64)
        found[self.rank] = value
        dist.all_reduce(found)
        return found.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on at least one rank. Collective."""
        if self.world_size == 1:
            return flag
        seen = torch.tensor(int(flag))
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen.item())

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if one has an error: the error itself there, PeerError elsewhere.

        Collective: every rank calls it after work that it did alone.

        Raises:
            PeerError: another rank failed; the message is that of its error.
        """
        if not self.any(error is not None):
            return
        words: list[str | None] = [None] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(words, None if error is None else str(error))
        if error is not None:
            raise error
        raise PeerError(next(said for said in words if said is not None))

    def on_main(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0; if it fails, all ranks raise. Collective."""
        problem: Exception | None = None
        if self.is_main:
            try:
                action()
            except Exception as error:
                problem = error
        self.agree(problem)

    def from_main(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0, and return a copy of its result on every rank.

        Use it where all ranks would otherwise read the same files from shared storage. The other
        ranks wait for up to two hours. Collective; if `make` fails, all ranks raise, as in `agree`.
        """
        if self.world_size == 1:
            return make()
        problem: Exception | None = None
        told: list[Any] = [None, None]
        with own_group(_PATIENCE) as apart:
            if self.is_main:
                try:
                    told[0] = make()
                except Exception as error:
                    problem, told[1] = error, str(error)
            apart(lambda: dist.broadcast_object_list(told, src=0, group=group()))
        if problem is not None:
            raise problem
        if told[1] is not None:
            raise PeerError(told[1])
        made: T = told[0]
        return made

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            # Use a CPU collective: dist.barrier() would pick NCCL and a device by itself.
            dist.all_reduce(torch.zeros(1))

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and self.world_size > 1 and not issubclass(kind, PeerError):
            claim()  # before the other ranks fail because the connection is closed
        self.close()
