"""`modulated_norm` in Triton: launches, op and autograd, which `residual_modulated_norm` shares.

Shapes: B samples, L tokens, D channels, M = B * L tokens in all, R condition rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from apt.kernels._triton.norm_kernels import (
    WIDE,
    Tiling,
    backward_kernel,
    backward_tiling,
    forward_kernel,
    forward_tiling,
    keeps_shared,
)
from apt.kernels._triton.processors import num_processors
from apt.kernels._triton.segment_sum import segment_sum
from apt.kernels.fused_op import FusedOp, backward_op
from apt.kernels.signatures import ModulatedNorm


class ModulatedNormBackward(NamedTuple):
    """Inputs of the backward pass; x is the input of the norm: x_new if there is an update."""

    grad_y: Tensor
    grad_x_new: Tensor | None
    x: Tensor
    update: Tensor | None
    gate: Tensor | None
    scale: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rows: Tensor | None
    stats: Tensor
    layer: bool
    modulation_grad: bool

    @property
    def per_token(self) -> bool:
        return self.scale.ndim == 3

    @property
    def num_sums(self) -> int:
        """Number of quantities that are summed over tokens."""
        if not self.modulation_grad:
            return 0
        if self.per_token:
            return 0 if self.weight is None and self.bias is None else 2
        return 2 if self.update is None else 3


def launch_forward(
    norm: ModulatedNorm, update: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return x_new (None without an update), y, and stats (1 or 2, M) fp32.

    stats are rstd and, for a layer norm, the mean.
    """
    per_token = norm.scale.ndim == 3
    x = norm.x.contiguous()
    x_new = None if update is None else torch.empty_like(x)
    y, stats = torch.empty_like(x), fake_stats(norm)
    num_tokens, width = stats.shape[1], x.shape[2]
    if num_tokens == 0:
        return x_new, y, stats
    gate, scale, shift = _matrix(gate), _matrix(norm.scale), _matrix(norm.shift)
    tiling = forward_tiling(width, per_token)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(num_tokens, tiling.tokens),)](
            x,
            _contiguous(update),
            gate,
            scale,
            shift,
            _contiguous(norm.weight),
            _contiguous(norm.bias),
            _contiguous(norm.rows),
            x_new,
            y,
            stats,
            num_tokens,
            x.shape[1],
            norm.eps,
            GATE_STRIDE=_row_stride(gate),
            SCALE_STRIDE=_row_stride(scale),
            SHIFT_STRIDE=_row_stride(shift),
            PER_TOKEN=per_token,
            LAYER=norm.layer,
            D=width,
            MAIN=tiling.main,
            REST=tiling.rest,
            TOKENS=tiling.tokens,
            num_warps=tiling.num_warps,
            maxnreg=tiling.registers,
            enable_fp_fusion=True,
        )
    return x_new, y, stats


def fake_stats(norm: ModulatedNorm) -> Tensor:
    """Return uninitialised stats (1 or 2, M) fp32."""
    x = norm.x
    return x.new_empty(2 if norm.layer else 1, x.shape[0] * x.shape[1], dtype=torch.float32)


def _launch_backward(
    inputs: ModulatedNormBackward,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients of x and update, of gate and scale if per token, and sums (K, R, D) fp32.

    For modulation per token, R = 1, and there are sums only if there is a weight or a bias.
    """
    update, per_token, num_sums = inputs.update, inputs.per_token, inputs.num_sums
    num_rows = inputs.scale.shape[0]
    batch, length, width = inputs.x.shape
    if per_token:  # tokens share only weight and bias
        batch, length, num_rows = 1, batch * length, 1
    x = inputs.x.contiguous()
    grad_x = torch.empty_like(x)
    grad_update = None if update is None else torch.empty_like(x, dtype=update.dtype)
    grad_gate = grad_scale = partials = None
    if inputs.modulation_grad and per_token:
        grad_scale = torch.empty_like(x, dtype=inputs.scale.dtype)
        grad_gate = None if inputs.gate is None else torch.empty_like(x, dtype=inputs.gate.dtype)
    num_tensors = 2 + 2 * (update is not None)
    num_tensors += (1 + (update is not None)) * per_token
    tiling = backward_tiling(width, num_tensors, x.element_size(), per_token)
    per_program, programs = _share_out(x.device, batch, length, tiling)
    if num_sums:
        partials = x.new_empty(num_sums, batch * programs, width, dtype=torch.float32)
    if x.numel() == 0:
        sums = x.new_zeros(num_sums, num_rows, width, dtype=torch.float32) if num_sums else None
        return grad_x, grad_update, grad_gate, grad_scale, sums
    gate, scale = _matrix(inputs.gate), _matrix(inputs.scale)
    rows = inputs.rows
    with torch.cuda.device_of(x):
        backward_kernel[(batch * programs,)](
            inputs.grad_y.contiguous(),
            _contiguous(inputs.grad_x_new),
            x,
            _contiguous(update),
            gate,
            scale,
            _contiguous(inputs.weight),
            _contiguous(inputs.bias),
            _contiguous(rows),
            inputs.stats,
            grad_x,
            grad_update,
            grad_gate,
            grad_scale,
            partials,
            batch * length,
            length,
            per_program,
            programs,
            GATE_STRIDE=_row_stride(gate),
            SCALE_STRIDE=_row_stride(scale),
            PER_TOKEN=per_token,
            LAYER=inputs.layer,
            D=width,
            MAIN=tiling.main,
            REST=tiling.rest,
            TOKENS=tiling.tokens,
            STAGES=tiling.stages,
            KEEP_SHARED=keeps_shared(tiling, update is not None, per_token),
            KEEP_X=tiling.main + tiling.rest <= WIDE or tiling.num_warps == 32,
            num_warps=tiling.num_warps,
            maxnreg=tiling.registers,
            enable_fp_fusion=True,
        )
        sums = None if partials is None else segment_sum(partials, rows, num_rows)
    return grad_x, grad_update, grad_gate, grad_scale, sums


def _share_out(device: torch.device, samples: int, length: int, tiling: Tiling) -> tuple[int, int]:
    """Return tokens per program, and programs per sample: each program stays within one sample."""
    wanted = triton.cdiv(num_processors(device) * max(1, 32 // tiling.num_warps), max(samples, 1))
    # Each program writes a row of sums in fp32, which is too much for few tokens
    tokens = max(triton.cdiv(length, wanted), 16, tiling.tokens)
    tokens = triton.cdiv(tokens, tiling.tokens) * tiling.tokens
    return tokens, triton.cdiv(length, tokens)


def _matrix(values: Tensor | None) -> Tensor | None:
    """Return (..., D) as a matrix with dense rows; copies only if strides do not allow a view."""
    if values is None:
        return None
    rows = values.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _row_stride(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)


# Ops of torch.library are opaque to compilers. `triton_op` is not, but cannot trace interpreted
# kernels, and there is nothing left to fuse here.


def _backward(
    inputs: ModulatedNormBackward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `_launch_backward` returns, with (0,) for None, which ops cannot return."""
    grad_x, *others = _launch_backward(inputs)
    grad_update, grad_gate, grad_scale, sums = (
        inputs.x.new_empty(0) if other is None else other for other in others
    )
    return grad_x, grad_update, grad_gate, grad_scale, sums


def _fake_backward(inputs: ModulatedNormBackward) -> tuple[Tensor, ...]:
    x, scale = inputs.x, inputs.scale

    def like(values: Tensor | None) -> Tensor:
        return x.new_empty(0) if values is None else values.new_empty(values.shape)

    each = inputs.per_token and inputs.modulation_grad
    sums = (inputs.num_sums, 1 if inputs.per_token else scale.shape[0], x.shape[2])
    return (
        like(x),
        like(inputs.update),
        like(inputs.gate if each else None),
        like(scale if each else None),
        x.new_empty(sums if inputs.num_sums else 0, dtype=torch.float32),
    )


modulated_norm_backward_op = backward_op(
    "apt::modulated_norm_backward",
    _backward,
    fake=_fake_backward,
    ops="modulated_norm and residual_modulated_norm",
)


def save(
    ctx: Any,
    norm: ModulatedNorm,
    x: Tensor,
    stats: Tensor,
    update: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Save what the backward pass needs, for both ops; x is the input of the norm."""
    ctx.save_for_backward(x, update, gate, norm.scale, norm.weight, norm.bias, norm.rows, stats)
    ctx.layer, ctx.shift_dtype = norm.layer, norm.shift.dtype
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, grad_y: Tensor | None, grad_x_new: Tensor | None, modulation_grad: bool
) -> tuple[tuple[Tensor | None, ...], Tensor | None, Tensor | None]:
    """Return gradients of `ModulatedNorm`'s fields, of update and of gate, from saved tensors."""
    x, *others = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    inputs = ModulatedNormBackward._make(
        (grad_y, grad_x_new, x, *others, ctx.layer, modulation_grad)
    )
    grad_x, grad_update, grad_gate, grad_scale, sums = modulated_norm_backward_op(inputs)
    if not modulation_grad:
        return (grad_x, *[None] * 7), grad_update, None
    scale, weight, bias, gate = inputs.scale, inputs.weight, inputs.bias, inputs.gate
    grad_weight = grad_bias = factor = None
    by_quantity: Any = sums.unbind() if sums.ndim == 3 else (None, None)
    x_hat_times, ones_times, *of_gate = by_quantity
    if inputs.per_token:
        grad_shift = grad_y.to(ctx.shift_dtype)
    else:
        grad_scale = x_hat_times if weight is None else x_hat_times * weight
        grad_scale = grad_scale if bias is None else grad_scale + ones_times * bias
        grad_scale, grad_shift = grad_scale.to(scale.dtype), ones_times.to(ctx.shift_dtype)
        grad_gate = None if gate is None else of_gate[0].to(gate.dtype)
        factor = None if weight is None and bias is None else 1 + scale.float()
    if weight is not None:
        grad_weight = _weighted_sum(x_hat_times, factor).to(weight.dtype)
    if bias is not None:
        grad_bias = _weighted_sum(ones_times, factor).to(bias.dtype)
    of_norm = grad_x, grad_scale, grad_shift, grad_weight, grad_bias, None, None, None
    return of_norm, grad_update, grad_gate


def _weighted_sum(sums: Tensor, factor: Tensor | None) -> Tensor:
    return (sums if factor is None else factor * sums).sum(0)


def _forward(norm: ModulatedNorm) -> tuple[Tensor, Tensor]:
    _, y, stats = launch_forward(norm)
    return y, stats


def _fake(norm: ModulatedNorm) -> tuple[Tensor, Tensor]:
    return norm.x.new_empty(norm.x.shape), fake_stats(norm)


def _save(ctx: Any, norm: ModulatedNorm, output: tuple[Tensor, Tensor]) -> None:
    save(ctx, norm, norm.x, output[1])


def _gradients(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return gradients(ctx, grad_y, None, any(ctx.needs_input_grad[1:5]))[0]


modulated_norm_op = FusedOp(
    "apt::modulated_norm", _forward, fake=_fake, save=_save, gradient=_gradients
)


def modulated_norm(norm: ModulatedNorm) -> Tensor:
    """Call the op, without checks."""
    if norm.scale.ndim != norm.shift.ndim:
        norm = each_token(norm)
    y: Tensor = modulated_norm_op(norm)[0]
    return y


def each_token(norm: ModulatedNorm) -> ModulatedNorm:
    """Expand all modulation per token: kernels do not mix it with rows."""
    scale, shift = spread(norm.scale, norm.x), spread(norm.shift, norm.x)
    return norm._replace(scale=scale, shift=shift)


def spread(values: Tensor, x: Tensor) -> Tensor:
    """Expand (B, D) modulation to the tokens of x (B, L, D); leave modulation per token as is."""
    return values if values.ndim == 3 else values[:, None].expand(x.shape)
