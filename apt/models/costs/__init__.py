"""Bytes and FLOPs of one forward pass of a network, layer by layer, and the least time it takes.

Each family has a counter for its config class, under `@counts` in its folder's `cost.py`. Work on
rows of conditions alone (activations of embeddings, modulation tables) is left out if it is
elementwise: it is a few vectors. All tensors count in one dtype: those that a model keeps in fp32
are also only vectors, unless a counter says otherwise.

Shapes: B samples, L visual tokens, S text tokens, D hidden size, R rows of conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from apt.errors import InputError
from apt.models.costs.counting import Sizes
from apt.models.costs.forward import DiTCost, Floor, LayerCost

__all__ = ["COUNTERS", "DiTCost", "Floor", "LayerCost", "Sizes", "counts", "dit_cost"]

C = TypeVar("C", bound=Callable[[Any, Sizes], DiTCost])

COUNTERS: dict[type, Callable[[Any, Sizes], DiTCost]] = {}
"""Counters by config class: they take a config and sizes and return the cost, or raise InputError
for sizes that the model does not accept."""


def counts(config_class: type) -> Callable[[C], C]:
    """Register a counter in `COUNTERS`, as a decorator."""

    def add(counter: C) -> C:
        COUNTERS[config_class] = counter
        return counter

    return add


def dit_cost(
    config: Any,
    batch: int,
    latent_shape: tuple[int, int, int],
    *,
    text_tokens: int = 256,
    num_rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> DiTCost:
    """Return the cost of a network's forward pass, without a mask and with one timestep per row.

    Args:
        config: the model's config, of a class in `COUNTERS`.
        batch: B.
        latent_shape: (T, H, W) of the latents, multiples of the patch.
        text_tokens: S; 0 counts only visual tokens, except in Wan, which pads all prompts to one
            length. The paper does not state it; 256 is usual.
        num_rows: R rows of timesteps and text; None: R = B.
        dtype: dtype of weights and activations.

    Raises:
        InputError: for a config without a counter, latents or text that the model does not accept,
            or numbers out of range.
    """
    if batch < 1 or text_tokens < 0 or (num_rows is not None and num_rows < 1):
        raise InputError(
            f"batch and num_rows must be at least 1 and text_tokens at least 0, got {batch}, "
            f"{num_rows}, {text_tokens}"
        )
    count = COUNTERS.get(type(config))
    if count is None:
        known = ", ".join(sorted(kind.__name__ for kind in COUNTERS))
        raise InputError(
            f"there is no counter of FLOPs and bytes for a {type(config).__name__}, only for "
            f"{known}; register one with @apt.models.costs.counts"
        )
    sizes = Sizes(
        batch=batch,
        latent_shape=latent_shape,
        text_tokens=text_tokens,
        rows=num_rows or batch,
        dtype=dtype,
    )
    return count(config, sizes)
