"""RMSNorm of queries and keys, and rotary positions.

    n = x / sqrt(mean(x^2) + eps) * weight            over a head's channels, or over all heads'
    (a, b) -> (a cos - b sin, a sin + b cos)          for each pair of channels of a head

Pair i of a head is channels (2i, 2i + 1) in the layout "interleaved", (i, i + Dh/2) in "half". The
table decides how time, height and width share the pairs (3D rotary positions).

`joint_qk_norm_rope` takes the fused projections of several streams (visual tokens, text tokens),
each with its own norms and rotation, and writes all of them into one sequence without a separate
concatenation. The gradient of each projection is likewise written as one tensor.

Bytes: forward, each of q and k is read once and written once; backward, x and dL/dy are read and
dL/dx is written. Everything before the last rounding is computed in at least fp32.

Shapes: B samples, L tokens (of a stream), H heads, Dh channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.kernels.signatures import NormRope, RopeOptions, StreamQKV

Layout = Literal["interleaved", "half"]

_JOINT = "joint_qk_norm_rope"


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    across_heads: bool = False,
    layout: Layout = "interleaved",
    backend: str | None = None,
) -> Tensor:
    """RMS-normalise queries or keys, then rotate them. `qk_norm_rope` does both in one launch.

    Args:
        x: (B, L, H, Dh), floating point, Dh even.
        weight: (Dh,) norm weight, or (H Dh,) across heads; None for 1.
        cos, sin: (L, Dh/2) of the angle of each pair at each position. None for both: no rotation
            (text tokens, cross-attention). They get no gradients.
        eps: added to the mean square.
        across_heads: one norm over the channels of all heads, as in Wan; else one per head.
        layout: which channels form a pair: "interleaved" or "half".
        backend: "triton", the fused kernel, for fp16, bf16 and fp32 and Dh (across heads: H Dh) up
            to 8192, once differentiable; "reference", plain torch, also for fp64, twice
            differentiable. None chooses the kernel for CUDA tensors that it can take and that are
            not small (`apt.kernels.backends.small_below`), else the reference. The kernel takes any
            strides, except that it copies x if channels are not adjacent.

    Returns:
        A new contiguous tensor with the shape and dtype of x.

    Raises:
        InputError: for shapes that do not fit, an unknown layout, and a backend that is unknown or
            cannot run.
    """
    op = "norm_rope"
    options = RopeOptions(eps, across_heads, is_half(op, layout))
    check_heads(op, "x", x)
    check_weight(op, "weight", weight, x, across_heads)
    check_table(op, cos, sin, x)
    return _norm_rope(op, NormRope(x, None, weight, None, cos, sin, options), backend)[0]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    across_heads: bool = False,
    layout: Layout = "interleaved",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS-normalise q and k, then rotate them; one launch if their shapes and strides agree.

    Args:
        q: (B, Lq, H, Dh), floating point, Dh even.
        k: (B, Lk, H, Dh); Lk = Lq if they are rotated.
        q_weight, k_weight: (Dh,) norm weights, or (H Dh,) across heads; None for 1.
        cos, sin, eps, across_heads, layout, backend: as in `norm_rope`.

    Returns:
        q and k, new contiguous tensors with the shapes and dtypes of the inputs.

    Raises:
        InputError: for shapes that do not fit, an unknown layout, and a backend that is unknown or
            cannot run.
    """
    op = "qk_norm_rope"
    options = RopeOptions(eps, across_heads, is_half(op, layout))
    check_heads(op, "q", q)
    check_heads(op, "k", k)
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise InputError(
            f"{op}: k must have the samples, heads and channels of q, {tuple(q.shape)}; "
            f"got {tuple(k.shape)}"
        )
    if cos is not None and k.shape != q.shape:
        raise InputError(
            f"{op}: one table rotates both, so k must have the shape of q, {tuple(q.shape)}; "
            f"got {tuple(k.shape)}"
        )
    check_weight(op, "q_weight", q_weight, q, across_heads)
    check_weight(op, "k_weight", k_weight, k, across_heads)
    check_table(op, cos, sin, q)
    q, k = _norm_rope(op, NormRope(q, k, q_weight, k_weight, cos, sin, options), backend)
    return q, k


def _norm_rope(op: str, inputs: NormRope, backend: str | None) -> list[Tensor]:
    """Return q, and k if there is one."""
    q, k, q_weight, k_weight, cos, sin, options = inputs
    limit = why_not_triton(q, options.across_heads)
    if k is not None:
        limit = limit or why_not_triton(k, options.across_heads)
    if resolve_backend(op, backend, inputs[:6], limit) == "triton":
        from apt.kernels._triton import norm_rope as fused

        return fused.norm_rope(inputs)
    parts = [(q, q_weight)] if k is None else [(q, q_weight), (k, k_weight)]
    return [norm_rope_reference(x, weight, cos, sin, options) for x, weight in parts]


def norm_rope_reference(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, options: RopeOptions
) -> Tensor:
    """Compute the op in torch for one tensor, without checks."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(dtype)
    if options.across_heads:
        wide = x.to(dtype).flatten(2)
        y = F.rms_norm(wide, wide.shape[-1:], weight, options.eps).unflatten(2, x.shape[2:])
    else:
        y = F.rms_norm(x.to(dtype), x.shape[-1:], weight, options.eps)
    if cos is None or sin is None:
        return y.to(x.dtype)
    rotate = _rotate_halves if options.half else _rotate
    return rotate(y, cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor does not generate code for complex numbers
        a, b = pairs.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    # A complex product is 10 times faster than real arithmetic on strided halves (eager, CPU, fp32)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def is_half(op: str, layout: str) -> bool:
    """Return whether a layout is "half". Raises InputError for an unknown layout."""
    if layout not in ("interleaved", "half"):
        raise InputError(f"{op}: layout must be 'interleaved' or 'half', got {layout!r}")
    return layout == "half"


def check_heads(op: str, name: str, x: Tensor) -> None:
    """Raise InputError unless x is (B, L, H, Dh) floating point with an even Dh."""
    if x.ndim != 4 or x.shape[-1] % 2 or not x.is_floating_point():
        raise InputError(
            f"{op}: {name} must be (B, L, H, Dh) floating point with an even Dh, got "
            f"{tuple(x.shape)} {x.dtype}"
        )


def check_weight(op: str, name: str, weight: Tensor | None, x: Tensor, across_heads: bool) -> None:
    """Raise InputError unless the weight has a value for each normalised channel."""
    width = x.shape[-2] * x.shape[-1] if across_heads else x.shape[-1]
    if weight is not None and weight.shape != (width,):
        raise InputError(f"{op}: {name} must be ({width},), got {tuple(weight.shape)}")


def check_table(op: str, cos: Tensor | None, sin: Tensor | None, x: Tensor) -> None:
    """Raise InputError unless cos and sin have a value for each position and pair."""
    if (cos is None) != (sin is None):
        raise InputError(f"{op}: pass both cos and sin, or neither")
    table = (x.shape[1], x.shape[-1] // 2)
    for name, values in (("cos", cos), ("sin", sin)):
        if values is not None and values.shape != table:
            raise InputError(f"{op}: {name} must be {table}, got {tuple(values.shape)}")
        if values is not None and values.requires_grad:
            raise InputError(
                f"{op}: no gradient reaches {name}; pass a table without requires_grad"
            )


def why_not_triton(x: Tensor, across_heads: bool) -> str | None:
    """Return why the kernels cannot take x (B, L, H, Dh) because of its shape; None if they can."""
    width = x.shape[-2] * x.shape[-1] if across_heads else x.shape[-1]
    if not 2 <= width <= 8192:  # whole rows must fit into registers
        return f"takes norms over 2 to 8192 channels, got {width}"
    if x.shape[0] * x.shape[1] * x.shape[2] > 2**30:  # rows are counted in 32 bits
        return f"takes up to 2^30 tokens times heads, got {x.shape[0] * x.shape[1] * x.shape[2]}"
    return None


def joint_qk_norm_rope(
    streams: Sequence[StreamQKV],
    *,
    eps: float = 1e-6,
    across_heads: bool = False,
    layout: Layout = "interleaved",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rotate q and k of each stream, and concatenate all streams along the sequence.

    Args:
        streams: at least one stream; all must agree in dtype, B, H and Dh.
        eps, across_heads, layout, backend: as in `norm_rope`.

    Returns:
        q (B, Lq, H, Dh) of the streams that have queries, k and v (B, Lk, H, Dh) of all streams, in
        the order of `streams`, in the dtype of the projections. The kernel returns contiguous ones.

    Raises:
        InputError: for shapes or dtypes that do not fit, an unknown layout, and a backend that is
            unknown or cannot run.
    """
    options = RopeOptions(eps, across_heads, is_half(_JOINT, layout))
    _check_streams(streams, across_heads)
    tensors = [value for stream in streams for value in stream]
    limits = (why_not_triton(stream.qkv[:, :, 0], across_heads) for stream in streams)
    limit = next((reason for reason in limits if reason), None)
    if resolve_backend(_JOINT, backend, tensors, limit) == "triton":
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


def _check_streams(streams: Sequence[StreamQKV], across_heads: bool) -> None:
    if not streams or all(stream.qkv.ndim == 5 and stream.qkv.shape[2] == 2 for stream in streams):
        raise InputError(f"{_JOINT}: at least one stream must have queries, (B, L, 3, H, Dh)")
    first = streams[0].qkv
    for number, (qkv, q_weight, k_weight, cos, sin) in enumerate(streams):
        name = f"streams[{number}]"
        if qkv.ndim != 5 or qkv.shape[2] not in (2, 3):
            raise InputError(
                f"{_JOINT}: {name}.qkv must be (B, L, 3, H, Dh), or (B, L, 2, H, Dh) without "
                f"queries; got {tuple(qkv.shape)}"
            )
        keys = qkv[:, :, -2]
        check_heads(_JOINT, f"the keys of {name}.qkv", keys)
        if (qkv.shape[0], *qkv.shape[3:]) != (first.shape[0], *first.shape[3:]):
            raise InputError(
                f"{_JOINT}: streams must agree in samples, heads and channels; got "
                f"{tuple(first.shape)} and {tuple(qkv.shape)}"
            )
        if qkv.dtype != first.dtype:
            raise InputError(
                f"{_JOINT}: streams must have one dtype, got {first.dtype}, {qkv.dtype}"
            )
        if qkv.shape[2] == 2 and q_weight is not None:
            raise InputError(f"{_JOINT}: {name} has no queries, so it takes no q_weight")
        check_weight(_JOINT, f"{name}.q_weight", q_weight, keys, across_heads)
        check_weight(_JOINT, f"{name}.k_weight", k_weight, keys, across_heads)
        check_table(_JOINT, cos, sin, keys)
