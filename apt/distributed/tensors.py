"""Tensors that may be sharded: a rank's shard, and the whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apt.distributed.collectives import rank, world

__all__ = ["WholeTensors", "is_sharded", "local", "own_rows", "shapes_found_inside", "whole"]


def is_sharded(kind: type) -> bool:
    """Return whether tensors of this type are sharded over ranks."""
    from torch.distributed.tensor import DTensor

    return issubclass(kind, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, with the same storage; a plain tensor unchanged."""
    from torch.distributed.tensor import DTensor  # slow to import, and kernels do without it

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor; a plain tensor unchanged. Collective."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> slice | None:
    """Return which rows of a sharded tensor this rank has; None for a plain tensor.

    FSDP2 splits along dimension 0, like `torch.chunk`.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    size, mesh = tensor.shape[0], tensor.device_mesh
    share = -(-size // mesh.size(mesh.ndim - 1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * share, size)
    return slice(start, start + tensor.to_local().shape[0])


class WholeTensors(Mapping[str, Tensor]):
    """A state dict whose tensors are gathered on the CPU, each when rank 0 reads it.

    Inside `shown`, rank 0 reads it like any mapping, in any order, and the other ranks contribute
    their shards until rank 0 is done. No rank holds more than one whole tensor at a time, unless
    rank 0 keeps them.

    Args:
        state: sharded or plain tensors, with the same names in the same order on all ranks.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = dict(state)
        self._numbers = {name: number for number, name in enumerate(self._state)}
        self._sharded = world() > 1

    def __getitem__(self, name: str) -> Tensor:
        if self._sharded:
            self._say(self._numbers[name])
        return whole(self._state[name]).detach().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    @contextmanager
    def shown(self) -> Iterator[bool]:
        """Yield True on rank 0, which reads; on the others yield False after it is done."""
        if rank() != 0:
            tensors = list(self._state.values())
            while (number := self._say(0)) < len(tensors):
                whole(tensors[number])
            yield False
            return
        try:
            yield True
        finally:
            if self._sharded:
                self._say(len(self))

    def _say(self, number: int) -> int:
        """Broadcast a number from rank 0, and return it."""
        said = torch.tensor([number])
        dist.broadcast(said, src=0)
        return int(said.item())


@contextmanager
def shapes_found_inside(context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter `context` whenever DTensor computes the shapes of an op's results.

    DTensor does this with tensors without data, of the size of the whole tensor.
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate(*args: Any) -> Any:
        with context():
            return original(*args)

    ShardingPropagator._propagate_tensor_meta_non_cached = propagate  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = original  # type: ignore[method-assign]
