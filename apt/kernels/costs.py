"""Bytes and FLOPs of every op, which benchmarks divide by the measured time.

Bytes are the least that a fused op must move through device memory: each input is read once, each
output and gradient is written once. Extra traffic of an implementation (statistics, partial sums, a
second pass) is not counted, so it lowers the GB/s of that implementation, as it should.

FLOPs are the additions, multiplications, divisions and square roots of the formula; a multiply-add
counts as two. Work per row that all its tokens share, and the integer work of random numbers, are
left out. Matrix products and attention are counted as `torch.utils.flop_counter` counts them.

Shapes: B samples, L tokens (S of text), D channels, H heads of Dh channels, R rows of conditions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from apt.errors import InputError

Norm = Literal["rms", "layer"]
Modulation = Literal["per_row", "per_token"]

_FP32 = 4
_INT64 = 8


@dataclass(frozen=True)
class OpCost:
    """Bytes and FLOPs of an op. Costs can be added, and multiplied by a number of calls.

    Attributes:
        bytes_read, bytes_written: traffic of device memory.
        flops: floating-point operations.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.flops + other.flops,
        )

    def __mul__(self, times: int) -> OpCost:
        return OpCost(self.bytes_read * times, self.bytes_written * times, self.flops * times)

    __rmul__ = __mul__


def modulated_norm_cost(
    batch: int,
    length: int,
    width: int,
    *,
    dtype: torch.dtype,
    num_rows: int | None = None,
    modulation: Modulation = "per_row",
    norm: Norm = "rms",
    weight: bool = False,
    bias: bool = False,
    backward: bool = False,
) -> OpCost:
    """Return the cost of `apt.kernels.modulated_norm` on (B, L, D), with every tensor in `dtype`.

    `num_rows` is R of the modulation; None: R = B, without `rows`.
    """
    return _norm_cost(
        batch, length, width, dtype, num_rows, modulation, norm, weight, bias, backward,
        residual=False,
    )  # fmt: skip


def residual_modulated_norm_cost(
    batch: int,
    length: int,
    width: int,
    *,
    dtype: torch.dtype,
    num_rows: int | None = None,
    modulation: Modulation = "per_row",
    norm: Norm = "rms",
    weight: bool = False,
    bias: bool = False,
    backward: bool = False,
) -> OpCost:
    """Return the cost of `apt.kernels.residual_modulated_norm`; see `modulated_norm_cost`.

    The backward pass takes the gradients of both outputs and returns those of x, update, gate,
    scale and shift (and weight and bias).
    """
    return _norm_cost(
        batch, length, width, dtype, num_rows, modulation, norm, weight, bias, backward,
        residual=True,
    )  # fmt: skip


def _norm_cost(
    batch: int,
    length: int,
    width: int,
    dtype: torch.dtype,
    num_rows: int | None,
    modulation: Modulation,
    norm: Norm,
    weight: bool,
    bias: bool,
    backward: bool,
    *,
    residual: bool,
) -> OpCost:
    if norm not in ("rms", "layer") or modulation not in ("per_row", "per_token"):
        raise InputError(f"there is no norm {norm!r} with modulation {modulation!r}")
    layer, per_token = norm == "layer", modulation == "per_token"
    tokens = batch * length * width
    shared = tokens if per_token else (batch if num_rows is None else num_rows) * width
    affine = (weight + bias) * width
    rows = _INT64 * batch * (num_rows is not None)
    size = dtype.itemsize
    if not backward:
        # x; scale and shift; with a residual also update, gate and x_new
        read = (1 + residual) * tokens + (2 + residual) * shared + affine
        written = (1 + residual) * tokens
        # sum of squares 2, normalise 1, modulate 2; layer norm: mean 1, its subtraction 1
        each = 5 + 2 * layer + weight + bias + per_token + 2 * residual
    else:
        # gradient of y, x (x_new); scale; with a residual also the gradient of x_new, update, gate
        read = (2 + 2 * residual) * tokens + (1 + residual) * shared + affine
        written = (1 + residual) * tokens + (2 + residual) * shared + affine
        # x_hat 1, g 1, its dot with x_hat 2, gradient of x 3, sums over tokens 3;
        # the mean's share 3; gradient of x_new 1, of update 1, of gate 2
        each = 10 + 3 * layer + 4 * residual
        # Factors that tokens no longer share, and the norm's output for the gradient of scale
        each += per_token * (1 + 2 * weight + bias)
    return OpCost(read * size + rows, written * size, each * tokens)


def qk_norm_rope_cost(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    num_tensors: int = 2,
    rope: bool = True,
    across_heads: bool = False,
    copied: int = 0,
    backward: bool = False,
) -> OpCost:
    """Return the cost of `apt.kernels.qk_norm_rope` for one stream; add streams for a joint call.

    Args:
        batch, length, num_heads, head_dim: B, L, H, Dh of each tensor.
        dtype: dtype of everything except the fp32 tables.
        num_tensors: number of normalised tensors: 2 for q and k.
        rope: whether they are rotated, by tables (L, Dh / 2) of cosines and sines in fp32.
        across_heads: one norm over H Dh channels, with as many weights, instead of one per head.
        copied: number of tensors that are only copied to the joint buffer: 1 for v.
        backward: the backward pass, which returns the gradients of tensors and weights.
    """
    values = batch * length * num_heads * head_dim
    weights = num_tensors * head_dim * (num_heads if across_heads else 1)
    tables = _FP32 * 2 * length * (head_dim // 2) * rope
    size = dtype.itemsize
    moved = (num_tensors + copied) * values
    if not backward:
        # norm 4 (with its weight), rotation 6 for a pair of channels
        return OpCost(
            (moved + weights) * size + tables,
            moved * size,
            (4 + 3 * rope) * num_tensors * values,
        )
    # x_hat 1, times weight 1, dot 2, gradient 3, sums for the weight 2; rotation back 3
    return OpCost(
        (moved + num_tensors * values + weights) * size + tables,
        (moved + weights) * size,
        (9 + 3 * rope) * num_tensors * values,
    )


def sample_shifted_timesteps_cost(num: int) -> OpCost:
    """Return the cost of `apt.kernels.sample_shifted_timesteps`: Eq. 7 takes 4 operations."""
    return OpCost(0, _FP32 * num, 4 * num)


def perturbed_batch_cost(
    num_real: int,
    num_fake: int,
    values: int,
    *,
    dtype: torch.dtype,
    num_perturbed: int | None = None,
    backward: bool = False,
) -> OpCost:
    """Return the cost of `apt.kernels.perturbed_batch` on samples of `values` values.

    `num_perturbed` is P; None: all real samples, P = B.
    """
    perturbed = num_real if num_perturbed is None else num_perturbed
    size = dtype.itemsize * values
    inputs, output = (num_real + num_fake) * size, (num_real + perturbed + num_fake) * size
    if not backward:
        return OpCost(inputs, output, 2 * perturbed * values)
    return OpCost(output, inputs, perturbed * values)


def query_pooling_cost(
    batch: int,
    length: int,
    width: int,
    num_heads: int,
    *,
    dtype: torch.dtype,
    backward: bool = False,
) -> OpCost:
    """Return the cost of `apt.kernels.query_pooling`: one query, with keys and values folded.

    The query is multiplied by W_k (2 D²), each head scores and pools L tokens of D channels
    (4 B L H D), and W_v is applied after pooling (2 B D²). Tokens (B, L, D) are read once and never
    projected. The kernel reads them twice forward and three times backward, so it can reach at most
    half of the copy rate in both directions. Only products are counted, without the norm.
    """
    tokens, matrices = batch * length * width, 2 * width * width
    scores = 2 * batch * length * num_heads * width
    size = dtype.itemsize
    if not backward:
        return OpCost(
            (tokens + matrices + width) * size,
            batch * width * size,
            2 * scores + (1 + batch) * matrices,
        )
    # Four products of the size of the scores, which are saved: two for the gradient of tokens, one
    # for that of their weights, one for that of the query
    return OpCost(
        (tokens + matrices + width + batch * width) * size,
        (tokens + matrices + width) * size,
        4 * scores + 2 * (1 + batch) * matrices,
    )


def attention_cost(
    batch: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    mask: bool = False,
    backward: bool = False,
) -> OpCost:
    """Return the cost of `apt.kernels.attention`: 4 B H Lq Lk Dh FLOPs forward, 10 backward.

    The backward pass computes the scores again, as flash attention does. Forward reads q, k and v
    and writes the output. Backward reads these four and the output's gradient, and writes three
    gradients.
    """
    queries = batch * num_queries * num_heads * head_dim
    keys = batch * num_keys * num_heads * head_dim
    size, mask_bytes = dtype.itemsize, batch * num_keys * mask
    product = 2 * queries * num_keys
    if not backward:
        return OpCost((queries + 2 * keys) * size + mask_bytes, queries * size, 2 * product)
    return OpCost(
        (3 * queries + 2 * keys) * size + mask_bytes, (queries + 2 * keys) * size, 5 * product
    )


def linear_cost(
    tokens: int,
    in_features: int,
    out_features: int,
    *,
    dtype: torch.dtype,
    bias: bool = True,
    backward: bool = False,
) -> OpCost:
    """Return the cost of a linear layer: 2 M K N FLOPs forward, 4 M K N backward."""
    inputs, outputs = tokens * in_features, tokens * out_features
    weights = in_features * out_features
    product = 2 * tokens * weights
    size = dtype.itemsize
    if not backward:
        return OpCost((inputs + weights + bias * out_features) * size, outputs * size, product)
    return OpCost(
        (inputs + weights + outputs) * size,
        (inputs + weights + bias * out_features) * size,
        2 * product,
    )


def elementwise_cost(reads: int, writes: int, flops: int, *, dtype: torch.dtype) -> OpCost:
    """Return the cost of one pass that reads `reads` values and writes `writes` values."""
    return OpCost(reads * dtype.itemsize, writes * dtype.itemsize, flops)


def fused_rmsprop_cost(
    parameters: int,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None = None,
    weight_decay: bool = False,
    ema: bool = True,
) -> OpCost:
    """Return the cost of one step of `FusedRMSprop`: parameters in `dtype`, states in fp32.

    The states are the square average and the EMA. v and the step take 9 operations, weight decay 2,
    the EMA 3.
    """
    size, grad = dtype.itemsize, (grad_dtype or dtype).itemsize
    state = _FP32 * (1 + ema)
    each = 9 + 2 * weight_decay + 3 * ema
    return OpCost(
        parameters * (size + grad + state), parameters * (size + state), parameters * each
    )
