"""Activation checkpointing of blocks: what is saved, and what the backward pass recomputes."""

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

# Prefixes of the attention ops that torch and the packages of `apt.kernels.attention` register.
_TORCH = "_scaled_dot_product_"
_PACKAGES = ("flash_attn", "xformers")


@dataclass(frozen=True)
class Checkpointing:
    """What is saved of a block from the forward pass for the backward pass: at least its input.

    Attributes:
        saves_attention: also save attention's output, (B, L, D) and one number for each query and
            head. With long sequences attention is most of a block's work, and is then not
            recomputed.
        offloads: keep block inputs in host memory, which is pinned if they are on a GPU.
    """

    saves_attention: bool = False
    offloads: bool = False

    def run(self, block: Callable[[Tensor, Tensor], Any], visual: Tensor, text: Tensor) -> Any:
        """Return `block(visual, text)`, saving only what the options say."""
        waits: AbstractContextManager[object] = contextlib.nullcontext()
        if self.offloads:
            waits = save_on_cpu(pin_memory=visual.is_cuda)
        options: dict[str, Any] = {}
        if self.saves_attention:
            options["context_fn"] = _keeping_attention
        with waits:
            return checkpoint(block, visual, text, use_reentrant=False, **options)


def _keeping_attention() -> tuple[_Kept, _Given]:
    """Return contexts for a block's forward pass and its recomputation.

    torch's `create_selective_checkpoint_contexts` needs the same ops both times, but a sharded
    block, which gathers its weights inside, runs different ops the second time.
    """
    outputs: list[Any] = []
    return _Kept(outputs), _Given(outputs)


class _Kept(TorchDispatchMode):
    """Saves the outputs of attention."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_attention(func):
            self.outputs.append(tree_map(_detached, result))
        return result


class _Given(TorchDispatchMode):
    """Returns the saved outputs, in order, instead of recomputing attention."""

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
    """Whether an op is attention of torch or of a package that `apt.kernels.attention` uses."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    name = op.name().partition("::")[2]
    return name.startswith(_TORCH) or op.namespace.startswith(_PACKAGES)
