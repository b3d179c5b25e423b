"""Queries, keys and values of several streams of tokens, made ready for joint attention.

Each stream (visual tokens, text tokens) has a fused projection, norms and a rotation of its own:

    q, k = rotate(norm(q)), rotate(norm(k));   v = v

and all of them land in one sequence, stream after stream, with no concatenation in between. The
gradient of a fused projection is likewise written as one tensor.

Bytes: the projections are read once and the joint buffers written once, forward; twice and once,
backward.

Shapes: B samples, L tokens of a stream, H heads, Dh channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.kernels.norm_rope import (
    Layout,
    check_heads,
    check_table,
    check_weight,
    is_half,
    norm_rope_reference,
    why_not_triton,
)
from apt.kernels.signatures import RopeOptions, StreamQKV

OP = "joint_qk_norm_rope"


def joint_qk_norm_rope(
    streams: Sequence[StreamQKV],
    *,
    eps: float = 1e-6,
    across_heads: bool = False,
    layout: Layout = "interleaved",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rotate q and k of each stream, and lay all streams out in one sequence.

    Args:
        streams: at least one, of one dtype; they agree in B, H and Dh.
        eps, across_heads, layout, backend: as in `norm_rope`.

    Returns:
        q (B, Lq, H, Dh) of the streams that have queries, k and v (B, Lk, H, Dh) of all streams, in
        the order of `streams`, in the dtype of the projections. The kernel's are contiguous.

    Raises:
        InputError: shapes or dtypes that do not fit, an unknown layout or backend, a backend that
            cannot run.
    """
    options = RopeOptions(eps, across_heads, is_half(OP, layout))
    _check(streams, across_heads)
    tensors = [value for stream in streams for value in stream]
    limits = (why_not_triton(stream.qkv[:, :, 0], across_heads) for stream in streams)
    limit = next((reason for reason in limits if reason), None)
    if resolve_backend(OP, backend, tensors, limit) == "triton":
        from apt.kernels._triton import joint_qk_norm_rope as fused

        return fused.joint_qk_norm_rope(streams, options)
    qs, ks, vs = [], [], []
    for qkv, q_weight, k_weight, cos, sin in streams:
        *queries, k, v = qkv.unbind(2)
        qs += [norm_rope_reference(q, q_weight, cos, sin, options) for q in queries]
        ks.append(norm_rope_reference(k, k_weight, cos, sin, options))
        vs.append(v)
    q, k, v = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in (qs, ks, vs))
    return q, k, v


def _check(streams: Sequence[StreamQKV], across_heads: bool) -> None:
    if not streams or all(stream.qkv.ndim == 5 and stream.qkv.shape[2] == 2 for stream in streams):
        raise InputError(f"{OP}: at least one stream must have queries, (B, L, 3, H, Dh)")
    first = streams[0].qkv
    for number, (qkv, q_weight, k_weight, cos, sin) in enumerate(streams):
        name = f"streams[{number}]"
        if qkv.ndim != 5 or qkv.shape[2] not in (2, 3):
            raise InputError(
                f"{OP}: {name}.qkv must be (B, L, 3, H, Dh), or (B, L, 2, H, Dh) without queries; "
                f"got {tuple(qkv.shape)}"
            )
        keys = qkv[:, :, -2]
        check_heads(OP, f"the keys of {name}.qkv", keys)
        if (qkv.shape[0], *qkv.shape[3:]) != (first.shape[0], *first.shape[3:]):
            raise InputError(
                f"{OP}: streams must agree in samples, heads and channels; got "
                f"{tuple(first.shape)} and {tuple(qkv.shape)}"
            )
        if qkv.dtype != first.dtype:
            raise InputError(f"{OP}: streams must have one dtype, got {first.dtype}, {qkv.dtype}")
        if qkv.shape[2] == 2 and q_weight is not None:
            raise InputError(f"{OP}: {name} has no queries, so it takes no q_weight")
        check_weight(OP, f"{name}.q_weight", q_weight, keys, across_heads)
        check_weight(OP, f"{name}.k_weight", k_weight, keys, across_heads)
        check_table(OP, cos, sin, keys)
