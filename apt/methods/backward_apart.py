"""Forward passes of a discriminator that each have a backward pass of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from apt.models.discriminator import DiscriminatorOutput, LogitNetwork


class BackwardApart:
    """A discriminator whose passes are gone back through one after the other.

    Autograd adds up what several passes give a weight, and only then lets the weight have it. Ranks
    that shard the weights would hold whole gradients from one pass until the other comes to the
    same block. A backward pass of its own reduces what it has computed, and forgets its
    activations, before the next begins. Sums are the same but for their order.
    """

    def __init__(self, discriminator: LogitNetwork) -> None:
        self._discriminator = discriminator
        self._passes: list[tuple[list[Tensor], list[Tensor]]] = []

    def __call__(
        self, x: Tensor, t: Tensor, c: Any, *, rows: Tensor | None = None
    ) -> DiscriminatorOutput:
        """As `LogitNetwork`; gradients of what it returns go no further until `backward`."""
        logits, features = self._discriminator(x, t, c, rows=rows)
        outputs = [logits, *features]
        cut = [output.detach().requires_grad_() for output in outputs]
        self._passes.append((outputs, cut))
        return DiscriminatorOutput(cut[0], cut[1:])

    def backward(self, loss: Tensor, turns: Callable[[int], Iterable[object]]) -> None:
        """Add the gradients of `loss` to those of D's weights, the last pass first.

        `turns` gives as many turns as it is told: `TrainedNetwork.backward_passes`.
        """
        loss.backward()
        for _ in turns(len(self._passes)):
            outputs, cut = self._passes.pop()
            reached = [output for output, c in zip(outputs, cut, strict=True) if c.grad is not None]
            gradients = [c.grad for c in cut if c.grad is not None]
            torch.autograd.backward(reached, gradients)
