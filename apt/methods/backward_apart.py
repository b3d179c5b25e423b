"""A separate backward pass for each forward pass of a discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from apt.models.discriminator import DiscriminatorOutput, LogitNetwork


class BackwardApart:
    """A discriminator whose forward passes get separate backward passes, the last one first.

    In a joint backward pass, autograd sums the gradients of a weight over all forward passes before
    it hands them over. Ranks with sharded weights would therefore hold unsharded gradients of whole
    blocks. A separate backward pass reduces its gradients and frees its activations before the next
    one starts. The sums differ only in their order.
    """

    def __init__(self, discriminator: LogitNetwork) -> None:
        self._discriminator = discriminator
        self._passes: list[tuple[list[Tensor], list[Tensor]]] = []

    def __call__(
        self, x: Tensor, t: Tensor, c: Any, *, rows: Tensor | None = None
    ) -> DiscriminatorOutput:
        """Run D as a `LogitNetwork`. The outputs are cut off from D's graph until `backward`."""
        logits, features = self._discriminator(x, t, c, rows=rows)
        outputs = [logits, *features]
        cut = [output.detach().requires_grad_() for output in outputs]
        self._passes.append((outputs, cut))
        return DiscriminatorOutput(cut[0], cut[1:])

    def backward(self, loss: Tensor, turns: Callable[[int], Iterable[object]]) -> None:
        """Add the gradients of `loss` to those of D's weights.

        Args:
            loss: a function of the outputs.
            turns: `TrainedNetwork.backward_passes`, which yields as often as it is told.
        """
        loss.backward()
        for _ in turns(len(self._passes)):
            outputs, cut = self._passes.pop()
            reached = [(o, c.grad) for o, c in zip(outputs, cut, strict=True) if c.grad is not None]
            torch.autograd.backward([o for o, _ in reached], [grad for _, grad in reached])
