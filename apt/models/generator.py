"""The one-step generator of APT Eq. 5."""

from __future__ import annotations

import torch
from torch import Tensor

from apt.flow import to_sample
from apt.models.conditions import TextCondition
from apt.models.protocols import VelocityNetwork


def generate(
    backbone: VelocityNetwork, z: Tensor, c: TextCondition, *, rows: Tensor | None = None
) -> Tensor:
    """G(z, c) = z - v(z, c, T): latents from noise in one evaluation (APT Eqs. 3-5).

    Args:
        backbone: any velocity network; its prediction at t = 1 is used.
        z: standard normal noise (B, C, T, H, W).
        c: R rows of conditions.
        rows: (B,) int64, the row of each sample; None if R = B.

    Returns:
        Clean latents (B, C, T, H, W), differentiable with respect to the weights and z.
    """
    t = torch.ones(len(c), device=z.device)
    t_B = t if rows is None else t[rows]
    return to_sample(z, backbone(z, t, c, rows=rows), t_B)
