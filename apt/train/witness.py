"""Record what each module of a rank computes, before gradients are summed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Rehearsed", "Seen", "witnessed"]


class Rehearsed(Exception):
    """Raised in a rehearsal, instead of updating weights."""


@dataclass
class Seen:
    """Outputs of modules and their gradients, in the order in which they were computed.

    Attributes:
        names: "the output of block.1", "the gradient at block.1".
        values: what `look` returned for each tensor.
    """

    names: list[str] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def first(self, wanted: Callable[[int, Tensor], bool]) -> str | None:
        """Return the first name for whose number and value `wanted` is true, or None."""
        for number, (name, value) in enumerate(zip(self.names, self.values, strict=True)):
            if wanted(number, value):
                return name
        return None

    def first_difference(self, other: Seen) -> str | None:
        """Return the first name whose values differ in a bit, or None."""
        if self.names != other.names:
            return "the order of its modules"
        return self.first(lambda number, value: not torch.equal(value, other.values[number]))


@contextmanager
def witnessed(
    networks: Mapping[str, nn.Module], look: Callable[[Tensor], Tensor]
) -> Iterator[Seen]:
    """Record the output, and its gradient, of every module without children inside the block.

    Args:
        networks: the networks by name.
        look: reduces a tensor to something small, on its device.
    """
    seen = Seen()

    def note(name: str, tensor: Tensor) -> None:
        seen.names.append(name)
        seen.values.append(look(tensor.detach()))

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    note(f"the output of {name}", tensor)
                    if tensor.requires_grad:
                        tensor.register_hook(lambda g: note(f"the gradient at {name}", g))

        return hook

    handles = [
        module.register_forward_hook(watch(f"{network}.{name}"))
        for network, whole in networks.items()
        for name, module in whole.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
