"""`norm_rope`, `qk_norm_rope` and `joint_qk_norm_rope` in Triton: launches, ops and autograd.

Gradients of weights are added up by each program, then by `segment_sum`: no atomics, so results
repeat bit for bit.

Shapes: B samples, L tokens, H heads, Dh channels per head, W normalised channels, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from apt.kernels._triton.common import no_double_backward, num_processors, save_nothing
from apt.kernels._triton.fused_op import fused_op
from apt.kernels._triton.rope_kernels import (
    Tiling,
    backward_kernel,
    backward_tiling,
    forward_kernel,
    forward_tiling,
)
from apt.kernels._triton.segment_sum import segment_sum


class Options(NamedTuple):
    """What all rows have in common."""

    eps: float
    across_heads: bool
    half: bool

    def constants(self, heads: int, channels: int) -> dict[str, Any]:
        """Compile-time arguments that follow from the shape."""
        group, width = (1, heads * channels) if self.across_heads else (heads, channels)
        return {"GROUP": group, "DH": channels, "WIDTH": width, "HALF": self.half}


class Parts(NamedTuple):
    """q, k and v of a stream, each (B, L, H, Dh) or absent."""

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
    """Weights of the norms, (W,), and cosines and sines (L, Dh / 2); each may be absent."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


def _forward(x: Parts, out: Parts, table: Table, options: Options) -> None:
    """Write into `out`, whose tokens are dense. The parts of x have the same strides."""
    batch, length, heads, channels = x.some.shape
    constants = options.constants(heads, channels)
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


def _backward(
    grad_out: Parts, x: Parts, table: Table, grad_x: Parts, options: Options, weight_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Write into `grad_x`, whose parts have the same strides; return the gradients of weights."""
    batch, length, heads, channels = x.some.shape
    constants = options.constants(heads, channels)
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
    """Rows per program, and programs."""
    wanted = triton.cdiv(num_processors(device) * max(1, 32 // tiling.num_warps), parts)
    # Each program writes a row of sums in fp32: few rows would not be worth that.
    per_program = max(triton.cdiv(rows, wanted), 16)
    per_program = triton.cdiv(per_program, tiling.rows) * tiling.rows
    return per_program, triton.cdiv(rows, per_program)


def _readable(x: Tensor) -> Tensor:
    """Kernels take any strides but of channels; within a row they count in 32 bits."""
    near = x.stride(-2) * x.shape[-2] < 2**31
    return x if x.stride(-1) == 1 and near else x.contiguous()


def _dense(grad: Tensor) -> Tensor:
    """Gradients of attention have dense tokens, or are copied."""
    heads, channels = grad.shape[2:]
    return grad if grad.stride()[1:] == (heads * channels, channels, 1) else grad.contiguous()


def _none_if_empty(x: Tensor) -> Tensor | None:
    return x.contiguous() if x.numel() else None


# Ops of torch.library take no lists with gaps: an absent weight or table is an empty tensor.


@fused_op("apt::norm_rope")
def norm_rope_op(
    xs: list[Tensor],
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    across_heads: bool,
    half: bool,
) -> list[Tensor]:
    xs = [_readable(x) for x in xs]
    outs = [x.new_empty(x.shape) for x in xs]
    for x, out, table in _launches(xs, outs, weights, cos, sin):
        _forward(x, out, table, Options(eps, across_heads, half))
    return outs


def _launches(
    xs: list[Tensor], others: list[Tensor], weights: list[Tensor], cos: Tensor, sin: Tensor
) -> list[tuple[Parts, Parts, Table]]:
    """One for two tensors of the same shape and strides, else one each."""
    turn = _none_if_empty(cos), _none_if_empty(sin)
    scales = [_none_if_empty(w) for w in weights]
    alike = len({(x.shape, x.stride(), x.dtype) for x in xs}) == 1
    if len(xs) == 2 and alike:
        return [(Parts(*xs), Parts(*others), Table(scales[0], scales[1], *turn))]
    return [
        (Parts(x), Parts(other), Table(scale, None, *turn))
        for x, other, scale in zip(xs, others, scales, strict=True)
    ]


@norm_rope_op.register_fake
def _(xs, weights, cos, sin, eps, across_heads, half):
    return [x.new_empty(x.shape) for x in xs]


@fused_op("apt::norm_rope_backward")
def norm_rope_backward_op(
    grads: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    across_heads: bool,
    half: bool,
    weight_grad: bool,
) -> list[Tensor]:
    """Gradients of xs, then, if wanted, of weights."""
    xs = [_readable(x) for x in xs]
    grads = [_dense(grad) for grad in grads]
    grad_xs = [x.new_empty(x.shape) for x in xs]
    of_weights: list[Tensor] = []
    begin = 0
    for x, grad_x, table in _launches(xs, grad_xs, weights, cos, sin):
        grad = Parts(*grads[begin : begin + x.number])
        found = _backward(grad, x, table, grad_x, Options(eps, across_heads, half), weight_grad)
        of_weights += [_or_empty(g, x.some) for g in found[: x.number]]
        begin += x.number
    return grad_xs + (of_weights if weight_grad else [])


def _or_empty(gradient: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if gradient is None else gradient


@norm_rope_backward_op.register_fake
def _(grads, xs, weights, cos, sin, eps, across_heads, half, weight_grad):
    of_weights = [w.new_empty(w.shape) if w.numel() else xs[0].new_empty(0) for w in weights]
    return [x.new_empty(x.shape) for x in xs] + (of_weights if weight_grad else [])


@fused_op("apt::joint_qk_norm_rope")
def joint_op(
    qkvs: list[Tensor],
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    coss: list[Tensor],
    sins: list[Tensor],
    eps: float,
    across_heads: bool,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    qkvs = [_readable(qkv) for qkv in qkvs]
    joint = _joint_buffers(qkvs)
    tables = _tables(q_weights, k_weights, coss, sins)
    for qkv, out, table in zip(qkvs, _slices(qkvs, joint), tables, strict=True):
        _forward(_parts(qkv), out, table, Options(eps, across_heads, half))
    return joint


def _joint_buffers(qkvs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    first = qkvs[0]
    batch, heads, channels = first.shape[0], *first.shape[3:]
    asked = sum(qkv.shape[1] for qkv in qkvs if qkv.shape[2] == 3)
    length = sum(qkv.shape[1] for qkv in qkvs)
    q, k, v = (first.new_empty(batch, n, heads, channels) for n in (asked, length, length))
    return q, k, v


def _slices(qkvs: list[Tensor], joint: tuple[Tensor, Tensor, Tensor]) -> list[Parts]:
    """Each stream's tokens in joint buffers (q, k, v)."""
    q, k, v = joint
    slices = []
    asked = begin = 0
    for qkv in qkvs:
        length = qkv.shape[1]
        mine = slice(begin, begin + length)
        queries = q[:, asked : asked + length] if qkv.shape[2] == 3 else None
        slices.append(Parts(queries, k[:, mine], v[:, mine]))
        asked += length if qkv.shape[2] == 3 else 0
        begin += length
    return slices


def _parts(qkv: Tensor) -> Parts:
    """(B, L, 3, H, Dh), or (B, L, 2, H, Dh) without q, taken apart."""
    return Parts(*qkv.unbind(2)) if qkv.shape[2] == 3 else Parts(None, *qkv.unbind(2))


def _tables(
    q_weights: list[Tensor], k_weights: list[Tensor], coss: list[Tensor], sins: list[Tensor]
) -> list[Table]:
    return [
        Table(*map(_none_if_empty, row))
        for row in zip(q_weights, k_weights, coss, sins, strict=True)
    ]


@joint_op.register_fake
def _(qkvs, q_weights, k_weights, coss, sins, eps, across_heads, half):
    return _joint_buffers(qkvs)


@fused_op("apt::joint_qk_norm_rope_backward")
def joint_backward_op(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkvs: list[Tensor],
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    coss: list[Tensor],
    sins: list[Tensor],
    eps: float,
    across_heads: bool,
    half: bool,
    weight_grad: bool,
) -> list[Tensor]:
    """Gradients of the qkvs, then, if wanted, of the q_weights and of the k_weights."""
    qkvs = [_readable(qkv) for qkv in qkvs]
    grads = _dense(grad_q), _dense(grad_k), _dense(grad_v)
    tables = _tables(q_weights, k_weights, coss, sins)
    of_qkvs, of_q, of_k = [], [], []
    for qkv, grad, table in zip(qkvs, _slices(qkvs, grads), tables, strict=True):
        of_qkv = qkv.new_empty(qkv.shape)
        options = Options(eps, across_heads, half)
        found = _backward(grad, _parts(qkv), table, _parts(of_qkv), options, weight_grad)
        of_qkvs.append(of_qkv)
        of_q.append(_or_empty(found[0], qkv))
        of_k.append(_or_empty(found[1], qkv))
    return of_qkvs + (of_q + of_k if weight_grad else [])


@joint_backward_op.register_fake
def _(
    grad_q, grad_k, grad_v, qkvs, q_weights, k_weights, coss, sins, eps, across_heads, half,
    weight_grad,
):  # fmt: skip
    like = [w.new_empty(w.shape) for w in (*q_weights, *k_weights)]
    return [qkv.new_empty(qkv.shape) for qkv in qkvs] + (like if weight_grad else [])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For both ops: lists of tensors, single ones, and three options."""
    *tensors, ctx.eps, ctx.across_heads, ctx.half = inputs
    ctx.sizes = [len(value) if isinstance(value, list) else None for value in tensors]
    ctx.save_for_backward(*(x for v in tensors for x in (v if isinstance(v, list) else [v])))


def _saved(ctx: Any) -> list[Any]:
    """Tensors as they were given, then the options."""
    saved = iter(ctx.saved_tensors)
    given = [
        next(saved) if size is None else [next(saved) for _ in range(size)] for size in ctx.sizes
    ]
    return [*given, ctx.eps, ctx.across_heads, ctx.half]


def _none_for(weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor | None]:
    """Gradients of what was there."""
    if not gradients:
        return [None] * len(weights)
    return [g if w.numel() else None for g, w in zip(gradients, weights, strict=True)]


def _norm_rope_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    xs, weights, *others = _saved(ctx)
    found = norm_rope_backward_op(grads, xs, weights, *others, any(ctx.needs_input_grad[1]))
    n = len(xs)
    return (found[:n], _none_for(weights, found[n:]), *[None] * 5)


def _joint_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Any, ...]:
    qkvs, q_weights, k_weights, *others = _saved(ctx)
    wanted = any(ctx.needs_input_grad[1]) or any(ctx.needs_input_grad[2])
    found = joint_backward_op(grad_q, grad_k, grad_v, qkvs, q_weights, k_weights, *others, wanted)
    n = len(qkvs)
    of_q = _none_for(q_weights, found[n : 2 * n])
    of_k = _none_for(k_weights, found[2 * n :])
    return (found[:n], of_q, of_k, [None] * n, [None] * n, *[None] * 3)


norm_rope_op.register_autograd(_norm_rope_backward, setup_context=_save)
_raises = no_double_backward("norm_rope, qk_norm_rope and joint_qk_norm_rope")
norm_rope_backward_op.register_autograd(_raises, setup_context=save_nothing)
joint_op.register_autograd(_joint_backward, setup_context=_save)
joint_backward_op.register_autograd(_raises, setup_context=save_nothing)


def norm_rope(
    xs: list[Tensor],
    weights: list[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    across_heads: bool,
    half: bool,
) -> list[Tensor]:
    """The op, without checks."""
    given = [_or_empty(w, xs[0]) for w in weights]
    turn = _or_empty(cos, xs[0]), _or_empty(sin, xs[0])
    return norm_rope_op(xs, given, *turn, eps, across_heads, half)


def joint_qk_norm_rope(
    qkvs: list[Tensor],
    tables: list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]],
    eps: float,
    across_heads: bool,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, without checks. `tables`: q_weight, k_weight, cos and sin of each stream."""
    lists = [
        [_or_empty(value, qkvs[0]) for value in column] for column in zip(*tables, strict=True)
    ]
    return joint_op(qkvs, *lists, eps, across_heads, half)
