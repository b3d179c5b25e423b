"""The boundary between two halves of a DiT block: gated residual, norm and modulation.

    x_new = x + gate * update
    y     = norm(x_new) * (1 + scale) + shift

Shapes: B samples, L tokens, D channels, R rows of conditions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.kernels.modulated_norm import (
    Norm,
    accumulation_dtype,
    check,
    is_layer,
    modulated_norm_reference,
    per_sample,
    why_not_triton,
)
from apt.kernels.signatures import ModulatedNorm, ResidualModulatedNorm


def residual_modulated_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm = "rms",
    eps: float = 1e-6,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a gated update to the residual stream, then norm and modulate the sum.

    Args:
        x: (B, L, D) residual stream, floating point.
        update: (B, L, D) output of the attention or MLP before it.
        gate, scale, shift: (R, D) per condition row, or (B, L, D) per token.
        weight, bias, norm, eps, rows, backend: as in `modulated_norm`.

    Returns:
        x_new and y, both (B, L, D) in x.dtype. The sum is computed in at least fp32; y is made
        from x_new as it is returned, that is, after its rounding.

    Raises:
        InputError: shapes that do not fit, an unknown norm or backend, a backend that cannot run.
    """
    op = "residual_modulated_norm"
    inner = ModulatedNorm(x, scale, shift, weight, bias, rows, eps, is_layer(op, norm))
    check(op, inner, gate)
    if update.shape != x.shape:
        raise InputError(
            f"{op}: update must have the shape of x, {tuple(x.shape)}; got {tuple(update.shape)}"
        )
    if resolve_backend(op, backend, (*inner[:6], update, gate), why_not_triton(x)) == "triton":
        from apt.kernels._triton import residual_modulated_norm as fused

        return fused.residual_modulated_norm(ResidualModulatedNorm(inner, update, gate))
    dtype = accumulation_dtype(x)
    x_new = torch.addcmul(x.to(dtype), update.to(dtype), per_sample(gate, rows, dtype)).to(x.dtype)
    return x_new, modulated_norm_reference(ModulatedNorm(x_new, *inner[1:]))
