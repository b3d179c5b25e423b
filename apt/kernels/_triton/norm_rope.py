"""`norm_rope` and `qk_norm_rope` in Triton: launches, op and autograd.

Gradients of weights are summed by each program, then by `segment_sum`, without atomics, so results
are the same bit for bit in every run.

Shapes: B samples, L tokens, H heads, Dh channels per head, W normalised channels, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from apt.kernels._triton.processors import num_processors
from apt.kernels._triton.rope_kernels import (
    Tiling,
    backward_kernel,
    backward_tiling,
    forward_kernel,
    forward_tiling,
)
from apt.kernels._triton.segment_sum import segment_sum
from apt.kernels.fused_op import FusedOp, backward_op, keep, kept
from apt.kernels.signatures import NormRope, RopeOptions


class Parts(NamedTuple):
    """q, k and v of a stream, each (B, L, H, Dh) or None."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None

    @property
    def some(self) -> Tensor:
        return next(part for part in self if part is not None)

    @property
    def number(self) -> int:
        return sum(part is not None for part in self)


class Table(NamedTuple):
    """Norm weights (W,), and cosines and sines (L, Dh / 2); each may be None."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


def _constants(options: RopeOptions, heads: int, channels: int) -> dict[str, Any]:
    """Return the compile-time arguments that follow from the shape."""
    group, width = (1, heads * channels) if options.across_heads else (heads, channels)
    return {"GROUP": group, "DH": channels, "WIDTH": width, "HALF": options.half}


def launch_forward(x: Parts, out: Parts, table: Table, options: RopeOptions) -> None:
    """Write into `out`, whose tokens are dense. All parts of x have the same strides."""
    batch, length, heads, channels = x.some.shape
    constants = _constants(options, heads, channels)
    tiling = forward_tiling(constants["WIDTH"], x.some.element_size())
    num_rows = batch * length * constants["GROUP"]
    if num_rows == 0:
        return
    keys = out.v if out.k is None else out.k
    with torch.cuda.device_of(x.some):
        forward_kernel[(triton.cdiv(num_rows, tiling.rows), x.number)](
            *x,
            *table,
            *out,
            *x.some.stride()[:3],
            0 if out.q is None else out.q.stride(0),
            0 if keys is None else keys.stride(0),
            num_rows,
            length,
            options.eps,
            **constants,
            MAIN=tiling.main,
            REST=tiling.rest,
            ROWS=tiling.rows,
            num_warps=tiling.num_warps,
            enable_fp_fusion=True,
        )


def launch_backward(
    grad_out: Parts, x: Parts, table: Table, grad_x: Parts, options: RopeOptions, weight_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Write into `grad_x`, whose parts have the same strides; return the gradients of weights."""
    batch, length, heads, channels = x.some.shape
    constants = _constants(options, heads, channels)
    width = constants["WIDTH"]
    tiling = backward_tiling(width, x.some.element_size(), options.half)
    num_rows = batch * length * constants["GROUP"]
    per_program, programs = _share_out(x.some.device, num_rows, grad_out.number, tiling)
    weighted = [w for w in table[:2] if w is not None and weight_grad]
    partials = x.some.new_empty(len(weighted), programs, width, dtype=torch.float32)
    by_part = iter(partials)
    q_partials, k_partials = (
        next(by_part) if w is not None and weight_grad else None for w in table[:2]
    )
    if num_rows:
        with torch.cuda.device_of(x.some):
            backward_kernel[(programs, grad_out.number)](
                *grad_out,
                *x[:2],
                *table,
                *grad_x,
                q_partials,
                k_partials,
                *(0 if grad is None else grad.stride(0) for grad in grad_out),
                *x.some.stride()[:3],
                grad_x.some.stride(1),
                num_rows,
                length,
                per_program,
                options.eps,
                **constants,
                MAIN=tiling.main,
                REST=tiling.rest,
                ROWS=tiling.rows,
                num_warps=tiling.num_warps,
                enable_fp_fusion=True,
            )
            sums = segment_sum(partials, None, 1)[:, 0] if weighted else partials[:, 0]
    else:
        sums = partials.new_zeros(len(weighted), width)
    by_part = iter(sums)
    q_grad, k_grad = (
        next(by_part).to(w.dtype, copy=True) if w is not None and weight_grad else None
        for w in table[:2]
    )
    return q_grad, k_grad


def _share_out(device: torch.device, rows: int, parts: int, tiling: Tiling) -> tuple[int, int]:
    """Return rows per program, and the number of programs."""
    wanted = triton.cdiv(num_processors(device) * max(1, 32 // tiling.num_warps), parts)
    # Each program writes a row of sums in fp32, which is too much for few rows
    per_program = max(triton.cdiv(rows, wanted), 16)
    per_program = triton.cdiv(per_program, tiling.rows) * tiling.rows
    return per_program, triton.cdiv(rows, per_program)


def readable(x: Tensor) -> Tensor:
    """Copy x unless channels are adjacent and offsets within a row of heads fit into 32 bits."""
    near = x.stride(-2) * x.shape[-2] < 2**31
    return x if x.stride(-1) == 1 and near else x.contiguous()


def dense(grad: Tensor) -> Tensor:
    """Copy a gradient unless its tokens are dense, as those of attention are."""
    heads, channels = grad.shape[2:]
    return grad if grad.stride()[1:] == (heads * channels, channels, 1) else grad.contiguous()


class NormRopeBackward(NamedTuple):
    """Inputs of the backward pass: gradients of q, and of k if there is one."""

    grads: list[Tensor]
    inputs: NormRope
    weight_grad: bool


def _launches(inputs: NormRope) -> list[tuple[Parts, Table]]:
    """Return one launch for two tensors of the same shape, strides and dtype, else one for each."""
    q, k = readable(inputs.q), None if inputs.k is None else readable(inputs.k)
    q_weight, k_weight, *turn = (
        None if value is None else value.contiguous() for value in inputs[2:6]
    )
    if k is None:
        return [(Parts(q), Table(q_weight, None, *turn))]
    if (q.shape, q.stride(), q.dtype) == (k.shape, k.stride(), k.dtype):
        return [(Parts(q, k), Table(q_weight, k_weight, *turn))]
    return [(Parts(q), Table(q_weight, None, *turn)), (Parts(k), Table(k_weight, None, *turn))]


def _empty_like(x: Parts) -> Parts:
    """Return dense tensors for all parts."""
    return Parts(*(None if part is None else part.new_empty(part.shape) for part in x))


def _forward(inputs: NormRope) -> list[Tensor]:
    found: list[Tensor] = []
    for x, table in _launches(inputs):
        out = _empty_like(x)
        launch_forward(x, out, table, inputs.options)
        found += [part for part in out if part is not None]
    return found


def _fake(inputs: NormRope) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:2] if x is not None]


def _backward(inputs: NormRopeBackward) -> list[Tensor]:
    """Return gradients of q and k and, if needed, of their weights; (0,) for a missing weight."""
    grads = iter(inputs.grads)
    options, weight_grad = inputs.inputs.options, inputs.weight_grad
    of_xs: list[Tensor] = []
    of_weights: list[Tensor] = []
    for x, table in _launches(inputs.inputs):
        grad = Parts(*(dense(next(grads)) for _ in range(x.number)))
        grad_x = _empty_like(x)
        found = launch_backward(grad, x, table, grad_x, options, weight_grad)
        of_xs += [part for part in grad_x if part is not None]
        of_weights += [or_empty(g, x.some) for g in found[: x.number]]
    return of_xs + (of_weights if weight_grad else [])


def or_empty(value: Tensor | None, x: Tensor) -> Tensor:
    """Return an empty tensor for None, which lists in ops cannot contain."""
    return x.new_empty(0) if value is None else value


def _fake_backward(inputs: NormRopeBackward) -> list[Tensor]:
    of_xs, weights = _fake(inputs.inputs), inputs.inputs[2:4]
    of_weights = [
        of_x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        for of_x, weight in zip(of_xs, weights, strict=False)
    ]
    return of_xs + (of_weights if inputs.weight_grad else [])


norm_rope_backward_op = backward_op(
    "apt::norm_rope_backward",
    _backward,
    fake=_fake_backward,
    ops="norm_rope, qk_norm_rope and joint_qk_norm_rope",
)


def _save(ctx: Any, inputs: NormRope, output: list[Tensor]) -> None:
    keep(ctx, inputs)


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    inputs: NormRope = kept(ctx)
    wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    found = norm_rope_backward_op(NormRopeBackward(grads, inputs, wanted))
    n = len(grads)
    of_q, of_k = (*found[:n], None)[:2]
    of_weights = (None if w is None else g for w, g in zip(inputs[2:4], found[n:], strict=False))
    return (of_q, of_k, *(*of_weights, None, None)[:2], *[None] * 5)


norm_rope_op = FusedOp("apt::norm_rope", _forward, fake=_fake, save=_save, gradient=_gradients)


def norm_rope(inputs: NormRope) -> list[Tensor]:
    """Call the op, without checks."""
    found: list[Tensor] = norm_rope_op(inputs)
    return found
