"""What torch counts in a forward pass: the oracle of every counter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from apt.kernels import attention_backend
from apt.models.costs import DiTCost


class Flops(NamedTuple):
    attention: int
    linear: int


def counted_by_torch(model: Any, *inputs: Any, **options: Any) -> Flops:
    """Return torch's count for one call. Batched products are those of attention: torch counts them
    in plain attention, but nothing in the CPU's fused kernel."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), attention_backend("_native_math"), counter:
        model(*inputs, **options)
    counts = counter.get_flop_counts()["Global"]
    attention = counts[torch.ops.aten.bmm]
    return Flops(attention, sum(counts.values()) - attention)


def flops_of(cost: DiTCost) -> Flops:
    return Flops(cost.total.attention.flops, cost.total.linear.flops)
