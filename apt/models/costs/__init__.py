"""What one forward pass of a network moves and computes, layer by layer, and its floor in time.

Each family has a counter for its class of configs, `cost.py` in its folder, under `@counts`.
Elementwise work on the rows of conditions alone (activations of embeddings, modulation tables) is
left out: it is a few vectors. All tensors count in one dtype; those that a model keeps in fp32 are
vectors too, but where a counter says so.

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
"""From a class of configs to the function that counts: config and sizes to the cost. It raises
InputError for sizes that the model cannot take."""


def counts(config_class: type) -> Callable[[C], C]:
    """Decorator: put a counter into `COUNTERS`."""

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
    """The cost of a network's forward pass, without a mask and with one timestep for each row.

    Args:
        config: of the model, of a class in `COUNTERS`.
        batch: B.
        latent_shape: (T, H, W) of the latents, multiples of the patch.
        text_tokens: S; 0 counts visual tokens alone, except in Wan, which pads every prompt to one
            length. The paper gives none; 256 is usual.
        num_rows: R rows of timesteps and text; None: R = B.
        dtype: of weights and activations.

    Raises:
        InputError: a config that nobody counts, latents or text that the model cannot take, or
            counts that make no sense.
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
            f"nobody has counted the FLOPs and bytes of a {type(config).__name__}, only of: "
            f"{known}; register its counter with @apt.models.costs.counts"
        )
    sizes = Sizes(
        batch=batch,
        latent_shape=latent_shape,
        text_tokens=text_tokens,
        rows=num_rows or batch,
        dtype=dtype,
    )
    return count(config, sizes)
