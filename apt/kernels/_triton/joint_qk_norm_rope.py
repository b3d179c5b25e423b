"""`joint_qk_norm_rope` in Triton: the launches of `norm_rope`, one for each stream.

Shapes: B samples, L tokens of a stream, H heads, Dh channels per head, W normalised channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from apt.kernels._triton.norm_rope import (
    Parts,
    Table,
    dense,
    launch_backward,
    launch_forward,
    or_empty,
    readable,
)
from apt.kernels.fused_op import FusedOp, backward_op, keep, kept
from apt.kernels.signatures import RopeOptions, StreamQKV


class JointQKNormRope(NamedTuple):
    """Inputs of the op: the fields of `StreamQKV`, each as a list over streams.

    Lists in ops cannot contain None, so a missing weight or table is an empty tensor.
    """

    qkv: list[Tensor]
    q_weight: list[Tensor]
    k_weight: list[Tensor]
    cos: list[Tensor]
    sin: list[Tensor]
    options: RopeOptions

    def launches(self, joint: Sequence[Tensor]) -> list[tuple[Tensor, Parts, Table]]:
        """Return for each stream its projection, its part of joint (q, k, v), and its tables."""
        qkvs = [readable(qkv) for qkv in self.qkv]
        rows = zip(*self[1:5], strict=True)
        tables = [Table(*(v.contiguous() if v.numel() else None for v in row)) for row in rows]
        return list(zip(qkvs, _slices(qkvs, joint), tables, strict=True))


class JointQKNormRopeBackward(NamedTuple):
    """Inputs of the backward pass."""

    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    inputs: JointQKNormRope
    weight_grad: bool


def _slices(qkvs: list[Tensor], joint: Sequence[Tensor]) -> list[Parts]:
    """Return the part of joint buffers (q, k, v) that belongs to each stream."""
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
    """Split (B, L, 3, H, Dh), or (B, L, 2, H, Dh) without q, into its parts."""
    return Parts(*qkv.unbind(2)) if qkv.shape[2] == 3 else Parts(None, *qkv.unbind(2))


def _joint_buffers(inputs: JointQKNormRope) -> tuple[Tensor, Tensor, Tensor]:
    qkvs, first = inputs.qkv, inputs.qkv[0]
    batch, heads, channels = first.shape[0], *first.shape[3:]
    asked = sum(qkv.shape[1] for qkv in qkvs if qkv.shape[2] == 3)
    length = sum(qkv.shape[1] for qkv in qkvs)
    q, k, v = (first.new_empty(batch, n, heads, channels) for n in (asked, length, length))
    return q, k, v


def _forward(inputs: JointQKNormRope) -> tuple[Tensor, Tensor, Tensor]:
    joint = _joint_buffers(inputs)
    for qkv, out, table in inputs.launches(joint):
        launch_forward(_parts(qkv), out, table, inputs.options)
    return joint


def _backward(inputs: JointQKNormRopeBackward) -> list[Tensor]:
    """Return the gradients of the qkvs and, if needed, of the q_weights and the k_weights."""
    grads = [dense(grad) for grad in inputs[:3]]
    of_qkvs, of_q, of_k = [], [], []
    for qkv, grad, table in inputs.inputs.launches(grads):
        of_qkv = qkv.new_empty(qkv.shape)
        found = launch_backward(
            grad, _parts(qkv), table, _parts(of_qkv), inputs.inputs.options, inputs.weight_grad
        )
        of_qkvs.append(of_qkv)
        of_q.append(or_empty(found[0], qkv))
        of_k.append(or_empty(found[1], qkv))
    return of_qkvs + (of_q + of_k if inputs.weight_grad else [])


def _fake_backward(inputs: JointQKNormRopeBackward) -> list[Tensor]:
    qkvs, q_weights, k_weights, *_ = inputs.inputs
    weights = (*q_weights, *k_weights) if inputs.weight_grad else ()
    return [x.new_empty(x.shape) for x in (*qkvs, *weights)]


joint_qk_norm_rope_backward_op = backward_op(
    "apt::joint_qk_norm_rope_backward",
    _backward,
    fake=_fake_backward,
    ops="norm_rope, qk_norm_rope and joint_qk_norm_rope",
)


def _save(ctx: Any, inputs: JointQKNormRope, output: Any) -> None:
    keep(ctx, inputs)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    inputs: JointQKNormRope = kept(ctx)
    n, (_, of_q, of_k, *_) = len(inputs.qkv), ctx.needs_input_grad
    wanted = any(of_q) or any(of_k)
    found = joint_qk_norm_rope_backward_op(JointQKNormRopeBackward._make((*grads, inputs, wanted)))
    of_weights = [
        [g if w.numel() else None for g, w in zip(gradients, weights, strict=True)]
        if wanted
        else [None] * n
        for gradients, weights in (
            (found[n : 2 * n], inputs.q_weight),
            (found[2 * n :], inputs.k_weight),
        )
    ]
    return (found[:n], *of_weights, [None] * n, [None] * n, *[None] * 3)


joint_qk_norm_rope_op = FusedOp(
    "apt::joint_qk_norm_rope", _forward, fake=_joint_buffers, save=_save, gradient=_gradients
)


def joint_qk_norm_rope(
    streams: Sequence[StreamQKV], options: RopeOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op, without checks."""
    first = streams[0].qkv
    lists = ([or_empty(value, first) for value in column] for column in zip(*streams, strict=True))
    q, k, v = joint_qk_norm_rope_op(JointQKNormRope._make((*lists, options)))
    return q, k, v
