"""Blocks whose activations are computed again in the backward pass, and what is kept of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

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
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        with waits:
            return checkpoint(block, visual, text, use_reentrant=False, **options)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Attention's outputs are saved, all else is computed again."""
    if not isinstance(op, torch._ops.OpOverload):
        return CheckpointPolicy.PREFER_RECOMPUTE
    name = op.name().partition("::")[2]
    if name.startswith(_TORCH) or op.namespace.startswith(_PACKAGES):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
