"""Cross-attention of one query to all tokens: how a discriminator's head reads a block's tokens.

    n_l = rms_norm(x_l) * weight
    p_h = softmax over l of (W_k,h n_l) . q_h / sqrt(Dh)
    y_h = sum over l of p_hl (W_v,h n_l + b_v,h)

With one query, keys and values can be folded into it, so that only x has the length of the tokens:

    (W_k,h n_l) . q_h = rstd_l x_l . a_h,            a_h = weight * W_k,h^T q_h
    y_h = W_v,h (weight * sum over l of p_hl rstd_l x_l) + b_v,h

since p_h sums to 1. A bias of the keys would add the same to every score and cancel in the softmax,
so there is none.

Folding, and values and bias after pooling, are small matrix products in torch. The kernel between
them reads x twice forward and three times backward, in its own dtype. For the backward pass it
saves x, the scores in fp32 (H per token) and rstd, and nothing else of that length. The reference
also converts x to fp32, and saves that and the scores three times. Calculated for a sample of
46,800 tokens in bf16 with D = 3072 and H = 48, the kernel saves 9 MB in addition to x, which takes
0.29 GB. The reference saves 0.6 GB, and norm, keys and values would save 4 L D, 2.3 GB in fp32.

Tokens that are split over ranks (`apt.distributed.sequence`) are pooled on their rank. The ranks
then exchange their pooled values and the logarithm of their sums of exponentials, (B, H, D + 1) in
fp32, which gives the weights of the pooled values:

    lse_h = log sum over l of exp s_hl;   pooled_h = sum over ranks of softmax(lse_h) pooled_h

Shapes: B samples, L tokens, D channels, H heads of Dh.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.distributed.sequence import SequenceGroup
from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.kernels.signatures import Pooling

OP = "query_pooling"


class QueryPooling(NamedTuple):
    """The tensors that `query_pooling` takes."""

    x: Tensor
    query: Tensor
    key_weight: Tensor
    value_weight: Tensor
    value_bias: Tensor | None
    norm_weight: Tensor | None


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
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    sequence: SequenceGroup | None = None,
) -> Tensor:
    """Apply an RMS norm, then attention of one query, shared by all samples, to all tokens.

    Args:
        x: (B, L, D) tokens, L at least 1, floating point.
        query: (H Dh,) projected query.
        key_weight: (H Dh, D) projection of the keys, as in `nn.Linear`.
        value_weight, value_bias: (E, D) and (E,) projection of the values; H divides E.
        num_heads: H.
        norm_weight: (D,) weight of the RMS norm.
        eps: added to its mean square.
        out_dtype: dtype of the result; None for that of x.
        backend: "triton", the fused kernel, for fp16, bf16 and fp32, D up to 8192 and H up to 128,
            once differentiable; "reference", plain torch, for any D and H and also fp64, twice
            differentiable. None chooses the kernel for CUDA tensors that it can take and that are
            not small (`apt.kernels.backends.small_below`), else the reference. The kernel copies x
            if it is not contiguous.
        sequence: ranks that share the tokens of the same samples, each with some of them in x; all
            get the same result. None: x has all tokens.

    Returns:
        (B, E) in `out_dtype`; everything before the last rounding is computed in at least fp32,
        also under autocast. In the kernel, products with bf16 tokens use 16 bits of the other
        factor.

    Raises:
        InputError: for shapes that do not fit, and a backend that is unknown or cannot run.
    """
    inputs = QueryPooling(x, query, key_weight, value_weight, value_bias, norm_weight)
    _check(inputs, num_heads)
    chosen = resolve_backend(OP, backend, inputs, _why_not_triton(x, num_heads))
    with torch.autocast(x.device.type, enabled=False):
        core = Pooling(x, _fold(inputs, num_heads), eps)
        if chosen == "triton":
            from apt.kernels._triton.query_pooling import pool, pool_parts
        else:
            pool, pool_parts = pool_reference, pool_parts_reference
        pooled = pool(core) if sequence is None else _merge(*pool_parts(core), sequence)
        y = _values(pooled, inputs)
    return y.to(x.dtype if out_dtype is None else out_dtype)


def _merge(pooled: Tensor, lse: Tensor, sequence: SequenceGroup) -> Tensor:
    """Combine pooled values (B, H, D) and lse (B, H) of all ranks, as if one had pooled all."""
    of_ranks = sequence.gather(torch.cat([pooled, lse.unsqueeze(-1)], dim=-1))
    return (of_ranks[..., -1:].softmax(dim=0) * of_ranks[..., :-1]).sum(dim=0)


def pool_reference(inputs: Pooling) -> Tensor:
    """Compute the core in torch, without checks: (B, H, D) in the dtype of the folded queries."""
    wide, rstd, scores = _scores(inputs)
    return (scores.softmax(dim=1) * rstd).transpose(1, 2) @ wide


def pool_parts_reference(inputs: Pooling) -> tuple[Tensor, Tensor]:
    """Compute the same, and the logarithm of the sum of the scores' exponentials, (B, H)."""
    wide, rstd, scores = _scores(inputs)
    pooled = (scores.softmax(dim=1) * rstd).transpose(1, 2) @ wide
    return pooled, scores.logsumexp(dim=1)


def _scores(inputs: Pooling) -> tuple[Tensor, Tensor, Tensor]:
    """Return x in the dtype of the folded queries, rstd (B, L, 1) and scores (B, L, H)."""
    x, folded, eps = inputs
    wide = x.to(folded.dtype)
    # `square().mean()` would need another tensor as large as x
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[2]
    rstd = (mean_square + eps).rsqrt()
    return wide, rstd, F.linear(wide, folded) * rstd


def _fold(inputs: QueryPooling, num_heads: int) -> Tensor:
    """Return the folded queries a (H, D) in at least fp32."""
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    q = inputs.query.to(dtype).view(num_heads, -1)
    keys = inputs.key_weight.to(dtype).view(*q.shape, -1)
    folded = torch.einsum("he,hed->hd", q, keys) * q.shape[1] ** -0.5
    return folded if inputs.norm_weight is None else folded * inputs.norm_weight.to(dtype)


def _values(pooled: Tensor, inputs: QueryPooling) -> Tensor:
    """Project pooled tokens (B, H, D) to values (B, E), in the dtype of `pooled`."""
    dtype = pooled.dtype
    values = inputs.value_weight.to(dtype).view(pooled.shape[1], -1, pooled.shape[2])
    if inputs.norm_weight is not None:
        pooled = pooled * inputs.norm_weight.to(dtype)
    y = torch.einsum("bhd,hed->bhe", pooled, values).flatten(1)
    return y if inputs.value_bias is None else y + inputs.value_bias.to(dtype)


def _why_not_triton(x: Tensor, num_heads: int) -> str | None:
    """Return why the kernels cannot take x (B, L, D) because of its shape; None if they can."""
    if not 1 <= x.shape[2] <= 8192:
        return f"takes 1 to 8192 channels, got {x.shape[2]}"
    if num_heads > 128:  # all heads of a token must fit into registers
        return f"takes up to 128 heads, got {num_heads}"
    if x.shape[0] * x.shape[1] > 2**30:  # tokens are counted in 32 bits, offsets in 64
        return f"takes up to 2^30 tokens, got {x.shape[0] * x.shape[1]}"
    return None


def _check(inputs: QueryPooling, num_heads: int) -> None:
    x, query, _, value_weight, *_ = inputs
    if x.ndim != 3 or x.shape[1] < 1 or not x.is_floating_point():
        raise InputError(
            f"{OP}: x must be (B, L, D) floating point with L at least 1, got {tuple(x.shape)} "
            f"{str(x.dtype).removeprefix('torch.')}"
        )
    width = x.shape[2]
    expected: dict[str, tuple[int, ...]] = {
        "query": query.shape[:1],
        "key_weight": (*query.shape[:1], width),
        "value_weight": (*value_weight.shape[:1], width),
        "value_bias": value_weight.shape[:1],
        "norm_weight": (width,),
    }
    for name, shape in expected.items():
        values = getattr(inputs, name)
        if values is not None and (values.shape != shape or not shape):
            raise InputError(f"{OP}: {name} must be {tuple(shape)}, got {tuple(values.shape)}")
    for name, size in (("query", query.shape[0]), ("value_weight", value_weight.shape[0])):
        if num_heads < 1 or size % num_heads:
            raise InputError(f"{OP}: the {size} rows of {name} must split into {num_heads} heads")
