"""Count the memory, operations and traffic of a computation, op by op.

Real tensors and tensors without data are counted in the same way, so tests can compare the two.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from apt.distributed.tensors import is_sharded, shapes_found_inside
from apt.models.checkpointing import is_attention

__all__ = ["CAST", "GATHERED", "OTHER", "Collective", "Tracker", "Work"]

OTHER = "activations"
GATHERED = "gathered blocks"
CAST = "cast weights"

_aten = torch.ops.aten
_FLASH_CPU = _aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_CPU_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward

# A new peak is broken down by part if it exceeds the last such peak by this share.
_STEP = 0.002


@dataclass(frozen=True)
class Collective:
    """A kind of collective, and its group.

    Attributes:
        kind: such as "all-gather".
        ranks: number of ranks in the group.
        stride: distance between them; 1 for neighbours.
    """

    kind: str
    ranks: int
    stride: int = 1

    @property
    def name(self) -> str:
        """The collective in words, for tables."""
        apart = f", {self.stride} apart" if self.stride > 1 else ""
        return f"{self.kind} of {self.ranks}{apart}"


@dataclass
class Work:
    """What was computed and sent.

    Attributes:
        linear, attention: floating-point operations of matrix products and of attention.
        sent: by kind of collective, the bytes of its largest tensor on this rank, input or output,
            summed over calls.
        calls: number of calls by kind of collective.
    """

    linear: float = 0.0
    attention: float = 0.0
    sent: Counter[Collective] = field(default_factory=Counter)
    calls: Counter[Collective] = field(default_factory=Counter)

    @property
    def flops(self) -> float:
        return self.linear + self.attention

    def scaled(self, factor: float) -> Work:
        """Return `factor` times the work."""
        return Work(
            self.linear * factor,
            self.attention * factor,
            Counter({key: round(value * factor) for key, value in self.sent.items()}),
            Counter({key: round(value * factor) for key, value in self.calls.items()}),
        )

    def plus(self, other: Work, sign: int = 1) -> Work:
        """Return the sum, or with sign -1, the difference."""
        sent, calls = Counter(self.sent), Counter(self.calls)
        for mine, theirs in ((sent, other.sent), (calls, other.calls)):
            for key, value in theirs.items():
                mine[key] += sign * value
        return Work(
            self.linear + sign * other.linear,
            self.attention + sign * other.attention,
            Counter({key: value for key, value in sent.items() if value}),
            Counter({key: value for key, value in calls.items() if value}),
        )


@dataclass(eq=False)
class _Held:
    """A live storage."""

    reference: weakref.ref[torch.UntypedStorage]
    size: int
    part: str
    is_all: bool = False


class Tracker(TorchDispatchMode):
    """While active, track every storage that ops create, until the storage is freed.

    Older storages count once an op returns them, or `adopt` is called.

    Args:
        name_parts: returns the names of parts by the addresses of their storages. It is called at
            new peaks, and overrides the parts that follow from ops.
        scalar: the value that reading a tensor on the host returns, because tensors without data
            have none; None reads the real value.

    Attributes:
        held: live bytes.
        peak: the most live bytes since `reset` or `begin_stretch`.
        parts: bytes by part at the peak.
        work: what was computed and sent since `reset`.
        attended: bytes of attention's outputs since a caller last set it to 0.
        scope: the part of storages created from now on; None derives it from the op.
    """

    def __init__(
        self,
        name_parts: Callable[[], Mapping[int, str]] = dict,
        *,
        scalar: float | None = None,
    ) -> None:
        super().__init__()
        self.name_parts = name_parts
        self._scalar = scalar
        self._alive: dict[int, _Held] = {}
        self.scope: str | None = None
        self._elsewhere = False
        self.attended = 0
        self.held = 0
        self.reset()

    def reset(self) -> None:
        """Start counting work and a new peak, from the bytes that are live now."""
        self.work = Work()
        self.begin_stretch()

    def begin_stretch(self) -> None:
        """Start a new peak, from the bytes that are live now."""
        self._detailed = self.peak = self.held
        self.parts = self.by_part()

    def adopt(self, tensors: Any, part: str = OTHER) -> None:
        """Count tensors that no tracked op has created."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor):
                self._note(tensor, part)
                held = self._alive.get(tensor.untyped_storage()._cdata)
                if held is not None:
                    held.part = part

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Count tensors created inside the block as 0 bytes, because they are in other memory."""
        self._elsewhere = True
        try:
            yield
        finally:
            self._elsewhere = False

    @contextmanager
    def watching(self) -> Iterator[Tracker]:
        """Activate the tracker, and also follow storages that are resized in place, as by FSDP."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            held = self._alive.get(storage._cdata)
            if held is not None:
                self._grow(size - held.size)
                held.size, held.part = size, GATHERED
                self._look()
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment,method-assign]
        try:
            with shapes_found_inside(self.elsewhere), self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a shortcut: each op asks several times
        if any(is_sharded(kind) for kind in types):
            return NotImplemented  # DTensor calls this again with ops on this rank's shard
        if func is _aten._local_scalar_dense.default and self._scalar is not None:
            dtype = args[0].dtype
            if dtype == torch.bool:
                return self._answer(args[0])
            return self._scalar if dtype.is_floating_point else int(self._scalar)
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        part = self._part_of(func, args)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value, part)
        if is_attention(func):
            given = [value for value in tree_iter(result) if isinstance(value, Tensor)]
            self.attended += sum(value.numel() * value.element_size() for value in given)
        if func._overloadpacket is _aten.all:
            self._alive[result.untyped_storage()._cdata].is_all = True
        if func.namespace in ("aten", "apt"):
            self._compute(func, args, kwargs, result)
        elif func.namespace in ("c10d", "_c10d_functional"):
            self._send(func, args)
        self._look()
        return result

    # --- memory -------------------------------------------------------------------------------

    def _part_of(self, func: Any, args: Any) -> str:
        if func.namespace in ("fsdp", "c10d"):
            return GATHERED
        if self.scope is not None:
            return self.scope
        if func is _aten._to_copy.default and self._is(args[0], "weights"):
            return CAST
        return OTHER

    def _is(self, tensor: Tensor, word: str) -> bool:
        held = self._alive.get(tensor.untyped_storage()._cdata)
        return held is not None and (held.part.endswith(word) or held.part == GATHERED)

    def _answer(self, condition: Tensor) -> bool:
        """Answer a check of values: all are valid, and none is invalid."""
        held = self._alive.get(condition.untyped_storage()._cdata)
        return held is not None and held.is_all

    def _note(self, tensor: Tensor, part: str) -> None:
        if tensor.layout != torch.strided:
            return
        if (tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device).type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        reference = weakref.ref(storage, lambda _: self._drop(key, held))
        held = _Held(reference, 0 if self._elsewhere else storage.nbytes(), part)
        self._alive[key] = held
        self._grow(held.size)

    def _drop(self, key: int, held: _Held) -> None:
        if self._alive.get(key) is held:
            del self._alive[key]
        self.held -= held.size

    def _grow(self, size: int) -> None:
        self.held += size

    def _look(self) -> None:
        """Record a new peak, and also its parts if it is much higher than the last."""
        if self.held <= self.peak:
            return
        self.peak = self.held
        if self.held > self._detailed * (1 + _STEP):
            self._detailed = self.held
            self.parts = self.by_part()

    def by_part(self) -> Counter[str]:
        """Return the live bytes by part."""
        named = self.name_parts()
        found: Counter[str] = Counter()
        for key, held in self._alive.copy().items():  # storages may be freed meanwhile
            if held.size:
                part = named.get(key)
                if part is not None:
                    held.part = part
                found[part or held.part] += held.size
        return found

    # --- computing and sending ----------------------------------------------------------------

    def _compute(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        if packet is _FLASH_CPU:
            self.work.attention += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet is _FLASH_CPU_BACKWARD:
            self.work.attention += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
            if "attention" in str(packet):
                self.work.attention += flops
            else:
                self.work.linear += flops

    def _send(self, func: Any, args: Any) -> None:
        name = func._schema.name.partition("::")[2]
        kind = next((kind for word, kind in _KINDS.items() if word in name), None)
        if kind is None:
            return
        tensors = [x for x in tree_iter(args) if isinstance(x, Tensor)]
        largest = max((x.numel() * x.element_size() for x in tensors), default=0)
        collective = _collective(kind, args)
        self.work.sent[collective] += largest
        self.work.calls[collective] += 1


_KINDS = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "broadcast": "broadcast",
}


def _collective(kind: str, args: Any) -> Collective:
    """Describe a collective by the group among its arguments, which may be given by name."""
    from apt.distributed.collectives import group_ranks

    found = (group_ranks(arg) for arg in args)
    ranks = next((ranks for ranks in found if ranks is not None), [0])
    return Collective(kind, len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1)
