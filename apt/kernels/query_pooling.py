"""Cross-attention of one query to all tokens: how a discriminator's head reads a block's tokens.

    n_l = rms_norm(x_l) * weight
    p_h = softmax over l of (W_k,h n_l) . q_h / sqrt(Dh)
    y_h = sum over l of p_hl (W_v,h n_l + b_v,h)

With one query, keys and values can be folded to its side, so that only x is as long as the tokens:

    (W_k,h n_l) . q_h = rstd_l x_l . a_h,            a_h = weight * W_k,h^T q_h
    y_h = W_v,h (weight * sum over l of p_hl rstd_l x_l) + b_v,h

since p_h adds up to 1. A bias of the keys would add the same to every score and drop out of the
softmax; its gradient is 0, so there is none.

There is no kernel. By arithmetic, for a sample of 46,800 tokens and D = 3072: the reference keeps
x in fp32 and three (L, H) for the backward pass, 0.6 GB, where norm, keys and values would keep 4 L
D, 2.3 GB. It reads x three times, 1.7 GB, and computes 28 GFLOP: about a millisecond of an H100,
next to 38 TFLOP in each block below it. A kernel could win no time that is seen; it could save the
fp32 copy of bf16 tokens.

Shapes: B samples, L tokens, D channels, H heads of Dh.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.errors import InputError
from apt.kernels.backends import resolve_backend


def query_pooling(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None = None,
    *,
    num_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """RMS norm, keys, values and attention of one query that all samples share.

    Args:
        x: (B, L, D) tokens, L at least 1, floating point.
        query: (H Dh,) projected query.
        key_weight: (H Dh, D) of the keys, as in `nn.Linear`.
        value_weight, value_bias: (E, D) and (E,) of the values; H divides E.
        num_heads: H.
        norm_weight: (D,) of the RMS norm.
        eps: added to its mean square.
        backend: None and "reference" are plain torch, differentiable any number of times.

    Returns:
        (B, E) in x.dtype; everything before the last rounding is computed in at least fp32,
        whatever autocast says.

    Raises:
        InputError: shapes that do not fit, an unknown backend.
    """
    resolve_backend("query_pooling", backend)
    _check(x, query, key_weight, value_weight, value_bias, norm_weight, num_heads)
    with torch.autocast(x.device.type, enabled=False):
        return query_pooling_reference(
            x, query, key_weight, value_weight, value_bias, num_heads, norm_weight, eps
        )


def query_pooling_reference(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """The op in torch, without checks."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    q = query.to(dtype).view(num_heads, -1)
    keys = key_weight.to(dtype).view(*q.shape, -1)
    values = value_weight.to(dtype).view(num_heads, -1, x.shape[2])
    folded = torch.einsum("he,hed->hd", q, keys) * q.shape[1] ** -0.5
    if norm_weight is not None:
        folded = folded * norm_weight.to(dtype)

    wide = x.to(dtype)
    # Not `square().mean()`, whose square is as large as x
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[2]
    rstd = (mean_square + eps).rsqrt()
    weights = (F.linear(wide, folded) * rstd).softmax(dim=1) * rstd
    pooled = weights.transpose(1, 2) @ wide
    if norm_weight is not None:
        pooled = pooled * norm_weight.to(dtype)
    y = torch.einsum("bhd,hed->bhe", pooled, values).flatten(1)
    return (y if value_bias is None else y + value_bias.to(dtype)).to(x.dtype)


def _check(
    x: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    norm_weight: Tensor | None,
    num_heads: int,
) -> None:
    op = "query_pooling"
    if x.ndim != 3 or x.shape[1] < 1 or not x.is_floating_point():
        raise InputError(
            f"{op}: x must be (B, L, D) floating point with L at least 1, got {tuple(x.shape)} "
            f"{str(x.dtype).removeprefix('torch.')}"
        )
    width = x.shape[2]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "query": (query, query.shape[:1]),
        "key_weight": (key_weight, (*query.shape[:1], width)),
        "value_weight": (value_weight, (*value_weight.shape[:1], width)),
        "value_bias": (value_bias, value_weight.shape[:1]),
        "norm_weight": (norm_weight, (width,)),
    }
    for name, (values, shape) in expected.items():
        if values is not None and (values.shape != shape or not shape):
            raise InputError(f"{op}: {name} must be {tuple(shape)}, got {tuple(values.shape)}")
    for name, size in (("query", query.shape[0]), ("value_weight", value_weight.shape[0])):
        if num_heads < 1 or size % num_heads:
            raise InputError(f"{op}: the {size} rows of {name} must split into {num_heads} heads")
