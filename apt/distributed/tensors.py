"""Tensors that may be sharded: a rank's part of one, and the whole."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["gather", "is_sharded", "local", "whole"]


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


def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole CPU tensors from a possibly sharded state; every rank must call it."""
    return {name: whole(value).detach().cpu() for name, value in state.items()}
