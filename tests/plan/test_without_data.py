from __future__ import annotations

import torch
from torch import nn

from apt.plan.without_data import without_data


def test_no_tensor_keeps_its_data() -> None:
    """A codec with `nn.Parameter(torch.tensor(0.5))` crashed the plan of its third stage."""
    with without_data():
        scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        doubled = 2 * scale
    assert all(getattr(tensor, "constant", 0) is None for tensor in (scale, doubled))
