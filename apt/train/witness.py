"""What each module of a rank computes, looked at by itself: before ranks add up their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Rehearsed", "Seen", "witnessed"]


class Rehearsed(Exception):
    """A part of an update that was only rehearsed has come to the point of moving weights."""


@dataclass
class Seen:
    """Outputs of modules and their gradients, in the order in which they were computed.

    Attributes:
        names: "output of block.1", "gradient at block.1".
        values: what was made of each tensor.
    """

    names: list[str] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def first(self, wanted: Callable[[int, Tensor], bool]) -> str | None:
        """The first one whose number and value are wanted."""
        for number, (name, value) in enumerate(zip(self.names, self.values, strict=True)):
            if wanted(number, value):
                return name
        return None

    def first_difference(self, other: Seen) -> str | None:
        """The first one that is not the same, bit for bit, in both."""
        if self.names != other.names:
            return "the order of its modules"
        return self.first(lambda number, value: not torch.equal(value, other.values[number]))


@contextmanager
def witnessed(
    networks: Mapping[str, nn.Module], look: Callable[[Tensor], Tensor]
) -> Iterator[Seen]:
    """Look at what every module without parts computes inside the block, and at its gradient.

    Args:
        networks: by name.
        look: makes something small of a tensor, on its device.
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
