"""Norm and modulation: the adaptive norm before every attention and MLP of a DiT.

    y = norm(x) * (1 + scale) + shift

Between the two halves of a block, the gated residual is added first, in the same pass:

    x_new = x + gate * update
    y     = norm(x_new) * (1 + scale) + shift

Shapes: B samples, L tokens, D channels, R rows of conditions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.kernels.signatures import ModulatedNorm, ResidualModulatedNorm

Norm = Literal["rms", "layer"]


def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm = "rms",
    eps: float = 1e-6,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute `norm(x) * (1 + scale) + shift`.

    Args:
        x: (B, L, D) tokens, floating point.
        scale, shift: (R, D) per condition row, or (B, L, D) per token.
        weight, bias: (D,) parameters of the norm itself; bias only with "layer".
        norm: "rms" (no mean subtracted) or "layer".
        eps: added to the mean square or variance.
        rows: (B,) int64, the condition row of each sample; several samples may share one without a
            copy. None: R = B. Its values are not checked beyond what indexing does.
        backend: "triton", the fused kernel, for fp16, bf16 and fp32 and D up to 8192, once
            differentiable; "reference", plain torch, for any D and also fp64, twice differentiable.
            None chooses the kernel for CUDA tensors that it can take and that are not small
            (`apt.kernels.backends.small_below`), else the reference. The kernel copies x if it is
            not contiguous, and modulation if its channels are not adjacent.

    Returns:
        (B, L, D) in x.dtype; everything before the last rounding is computed in at least fp32.

    Raises:
        InputError: for shapes that do not fit, an unknown norm, and a backend that is unknown or
            cannot run.
    """
    op = "modulated_norm"
    inputs = ModulatedNorm(x, scale, shift, weight, bias, rows, eps, is_layer(op, norm))
    check(op, inputs)
    if resolve_backend(op, backend, inputs[:6], why_not_triton(x)) == "triton":
        from apt.kernels._triton import modulated_norm as fused

        return fused.modulated_norm(inputs)
    return modulated_norm_reference(inputs)


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
    """Add a gated update to the residual stream, then normalise and modulate the sum.

    Args:
        x: (B, L, D) residual stream, floating point.
        update: (B, L, D) output of the attention or MLP before it.
        gate, scale, shift: (R, D) per condition row, or (B, L, D) per token.
        weight, bias, norm, eps, rows, backend: as in `modulated_norm`.

    Returns:
        x_new and y, both (B, L, D) in x.dtype. The sum is computed in at least fp32; y is computed
        from x_new after its rounding.

    Raises:
        InputError: for shapes that do not fit, an unknown norm, and a backend that is unknown or
            cannot run.
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


def modulated_norm_reference(inputs: ModulatedNorm) -> Tensor:
    """Compute the op in torch, without checks."""
    x, dtype = inputs.x, accumulation_dtype(inputs.x)
    wide, shape = x.to(dtype), (x.shape[-1],)
    weight = None if inputs.weight is None else inputs.weight.to(dtype)
    if inputs.layer:
        bias = None if inputs.bias is None else inputs.bias.to(dtype)
        normed = F.layer_norm(wide, shape, weight, bias, inputs.eps)
    else:
        normed = F.rms_norm(wide, shape, weight, inputs.eps)
    scale = per_sample(inputs.scale, inputs.rows, dtype) + 1
    return torch.addcmul(per_sample(inputs.shift, inputs.rows, dtype), normed, scale).to(x.dtype)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def per_sample(values: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (R, D) rows as (B, 1, D), and (B, L, D) values per token unchanged, in `dtype`."""
    values = values.to(dtype)  # before rows repeat, so that their gradients add up in this dtype
    if values.ndim == 3:
        return values
    return take_rows(values, rows).unsqueeze(1)


def is_layer(op: str, norm: str) -> bool:
    """Return whether a norm is a layer norm. Raises InputError for an unknown norm."""
    if norm not in ("rms", "layer"):
        raise InputError(f"{op}: norm must be 'rms' or 'layer', got {norm!r}")
    return norm == "layer"


def check(op: str, inputs: ModulatedNorm, gate: Tensor | None = None) -> None:
    """Raise InputError unless modulation, rows, weight and bias fit x (B, L, D)."""
    x, rows = inputs.x, inputs.rows
    if x.ndim != 3 or not x.is_floating_point():
        raise InputError(f"{op}: x must be (B, L, D) floating point, got {_describe(x)}")
    tokens = x.shape
    samples, _, width = tokens
    if rows is not None and (rows.shape != (samples,) or rows.dtype != torch.int64):
        raise InputError(f"{op}: rows must be ({samples},) int64, got {_describe(rows)}")
    for name, values in (("gate", gate), ("scale", inputs.scale), ("shift", inputs.shift)):
        if values is None:
            continue
        shape = values.shape
        if rows is None and shape == tokens:
            continue
        if len(shape) == 2 and shape[1] == width:
            if rows is not None or shape[0] == samples:
                continue
            raise InputError(
                f"{op}: {name} has {shape[0]} rows for {samples} samples; "
                "pass rows (B,) to say which row each sample uses"
            )
        raise InputError(
            f"{op}: {name} must be (R, {width}), or without rows {tuple(tokens)} (per token); "
            f"got {_describe(values)}"
        )
    if inputs.bias is not None and not inputs.layer:
        raise InputError(f"{op}: an RMS norm has no bias; drop it or use norm='layer'")
    for name, parameter in (("weight", inputs.weight), ("bias", inputs.bias)):
        if parameter is not None and parameter.shape != (width,):
            raise InputError(f"{op}: {name} must be ({width},), got {_describe(parameter)}")


def why_not_triton(x: Tensor) -> str | None:
    """Return why the kernels cannot take x (B, L, D) because of its shape; None if they can."""
    if not 1 <= x.shape[2] <= 8192:  # whole rows must fit into registers
        return f"takes 1 to 8192 channels, got {x.shape[2]}"
    if x.shape[0] * x.shape[1] > 2**30:  # tokens are counted in 32 bits, offsets in 64
        return f"takes up to 2^30 tokens, got {x.shape[0] * x.shape[1]}"
    return None


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def take_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return the row of `values` (R, ...) for each sample: (B, ...).

    `rows` (B,) int64 may repeat a row; None: R = B, and `values` are returned as is.
    """
    if rows is None:
        return values
    # The backward pass of embedding adds repeated rows in a fixed order on every device. Those of
    # indexing and index_select use atomics on some devices, even on the CPU; a resumed run would
    # then differ from an uninterrupted one.
    return F.embedding(rows, values.flatten(1)).unflatten(1, values.shape[1:])
