"""Tensors that may be sharded: a rank's part of one, and the whole."""

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
    """Whether tensors of a type are a rank's parts of whole ones."""
    from torch.distributed.tensor import DTensor

    return issubclass(kind, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its storage; a plain tensor as it is."""
    from torch.distributed.tensor import DTensor  # slow to import, and kernels need not be

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; every rank must call it. A plain tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> slice | None:
    """Which rows of the whole this rank has of a sharded tensor; None for a plain one.

    FSDP2 cuts along dimension 0 as `torch.chunk` does.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    size, mesh = tensor.shape[0], tensor.device_mesh
    share = -(-size // mesh.size(mesh.ndim - 1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * share, size)
    return slice(start, start + tensor.to_local().shape[0])


class WholeTensors(Mapping[str, Tensor]):
    """A state whose tensors are made whole on the CPU, each when rank 0 asks for it.

    Rank 0 reads it as any mapping, in any order, inside `shown`; the other ranks give their parts
    until it has done. No rank has more than one whole tensor at a time, unless rank 0 keeps it.

    Args:
        state: the same names in the same order on all ranks; sharded tensors or plain ones.
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
        """Whether this is rank 0, which reads; the others have served it when they get here."""
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
        """What rank 0 says."""
        said = torch.tensor([number])
        dist.broadcast(said, src=0)
        return int(said.item())


@contextmanager
def shapes_found_inside(context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter `context` around each time that DTensor finds the shapes of an op's results.

    It does so with tensors without data, of the size of all shards together.
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
