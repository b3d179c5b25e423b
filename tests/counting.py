"""What an update costs, counted instead of timed: collectives with their bytes, and live memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apt.distributed.tensors import local

__all__ = ["CollectiveCounter", "LiveTensors", "bytes_of"]

# As c10d and the functional collectives name them, without underscores.
_COLLECTIVES = {
    "allgather": "all_gather",
    "allgatherinto": "all_gather",
    "reducescatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
}


class CollectiveCounter(TorchDispatchMode):
    """Counts this process's collectives on tensors while it is entered.

    Attributes:
        calls: by name: "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast".
        sent: bytes that go into each, before any algorithm multiplies them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.__name__.partition(".")[0], args, given)
        return func(*args, **given)

    def _count(self, name: str, args: Sequence[Any], given: Mapping[str, Any]) -> None:
        plain = name.replace("_", "")
        known = [kind for start, kind in _COLLECTIVES.items() if plain.startswith(start)]
        if not known:
            return
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        # c10d is given outputs too: the smaller side is what a rank puts in, except in a scatter.
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        self.calls[known[0]] += 1
        self.sent[known[0]] += max(sizes) if known[0] == "reduce_scatter" else min(sizes)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes that operations allocate and free while it is entered.

    Older tensors and mapped files are not counted. Each storage counts once.

    Attributes:
        live: bytes that are allocated and not yet freed.
        peak: the largest value of `live`.
        largest: bytes of the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = [returned.alias_info is None for returned in func._schema.returns]
        if any(fresh):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._add(local(leaf))
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def bytes_of(state: Any) -> int:
    """Return this rank's bytes of the tensors in a tree; a tensor that occurs twice counts once."""
    storages = {}
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor) and not (part := local(leaf.detach())).is_meta:
            storages[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
    return sum(storages.values())
