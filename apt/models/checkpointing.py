"""Blocks whose activations are computed again in the backward pass, and what is kept of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

# Ops of attention as torch and the packages of `apt.kernels.attention` register them.
_TORCH = "_scaled_dot_product_"
_PACKAGES = ("flash_attn", "xformers")


@dataclass(frozen=True)
class Checkpointing:
    """What is kept of a block from the forward pass to the backward pass.

    Attributes:
        saves_attention: beside the block's input what attention gave, (B, L, D) and a number for
            each query and head. At long sequences attention is most of a block's work, and is not
            done again.
        offloads: inputs wait in host memory, which on a GPU is pinned.
    """

    saves_attention: bool = False
    offloads: bool = False

    def run(self, block: Callable[[Tensor, Tensor], Any], visual: Tensor, text: Tensor) -> Any:
        """`block(visual, text)`, with nothing else kept of it."""
        waits: AbstractContextManager[object] = contextlib.nullcontext()
        if self.offloads:
            waits = save_on_cpu(pin_memory=visual.is_cuda)
        options: dict[str, Any] = {}
        if self.saves_attention:
            options["context_fn"] = _keeping_attention
        with waits:
            return checkpoint(block, visual, text, use_reentrant=False, **options)


def _keeping_attention() -> tuple[_Kept, _Given]:
    """Contexts of a block's forward pass and of its repetition.

    torch's own (`create_selective_checkpoint_contexts`) want the same ops both times, and blocks
    whose weights are gathered inside them have others the second time.
    """
    outputs: list[Any] = []
    return _Kept(outputs), _Given(outputs)


class _Kept(TorchDispatchMode):
    """Keeps what attention gives."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_attention(func):
            self.outputs.append(tree_map(_detached, result))
        return result


class _Given(TorchDispatchMode):
    """Gives it again, in the same order, where attention would be computed again."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = outputs
        self.given = 0

    def __enter__(self) -> Any:
        self.given = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_attention(func):
            return func(*args, **(kwargs or {}))
        self.given += 1
        return tree_map(_detached, self.outputs[self.given - 1])


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def is_attention(op: Any) -> bool:
    """Whether an op is attention, of torch or of a package that `apt.kernels.attention` knows."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    name = op.name().partition("::")[2]
    return name.startswith(_TORCH) or op.namespace.startswith(_PACKAGES)
