"""The core of `query_pooling` in Triton: tokens pooled by softmax weights of H folded queries.

    u_hl = x_l . a_h;   rstd_l = (mean(x_l^2) + eps)^-1/2;   s = rstd u;   p = softmax of s over l
    w_hl = p_hl rstd_l;                                      pooled_h = sum over l of w_hl x_l

and backward, from g_h = dL/dpooled_h, with delta_h = g_h . pooled_h = sum over l of p_hl dp_hl:

    dp = rstd g_h . x_l;   ds = p (dp - delta);   du = ds rstd
    dx_l = sum over h of (w_hl g_h + du_hl a_h) - x_l rstd_l^2 / D sum over h of (p dp + ds s)_hl
    da_h = sum over samples and l of du_hl x_l

Every product over tokens or channels is a matrix product with H as one side: `scores_kernel`
computes s and rstd, `weighted_sum_kernel` the sums over tokens, `tokens_backward_kernel` dx and du.
x is read twice forward and three times backward, in its own dtype. Otherwise only s, du and rstd
have the length of the tokens, 4 (2 H + 1) bytes per token. `segment_sum` adds the sums of programs,
without atomics, so results are the same bit for bit in every run.

Precision on a GPU: bf16 tokens use bf16 tensor cores, and a factor in fp32 (a, g, w, du) is split
into the sum of two bf16 parts, which keep 16 bits of it; a product of two such factors leaves out
the product of the low parts. fp16 and fp32 tokens use three products of TF32 (`tf32x3`), which keep
about 21 bits. Sums are fp32. The interpreter multiplies the same parts in fp32.

Shapes: B samples, L tokens, N when padded to blocks of PAD, D channels, H heads, P splits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt.kernels._triton.processors import num_processors
from apt.kernels._triton.segment_sum import segment_sum
from apt.kernels.backends import interpreted
from apt.kernels.fused_op import FusedOp, backward_op
from apt.kernels.signatures import Pooling

# Stored scores are padded to a multiple of this many tokens, so that their rows start at whole
# vectors, and kernels need not check whether a token has a score.
PAD = 64

# Numbers that change from batch to batch. Not specialised: multiples of 16 need no new compilation.
COUNTS = ("length", "blocks", "splits", "blocks_per_split", "samples")


@triton.jit
def _inside(valid, columns, D: tl.constexpr, BLOCK: tl.constexpr):
    if D % BLOCK == 0:
        return valid
    else:
        return valid & (columns < D)


@triton.jit
def _split(values, PARTS: tl.constexpr, WIDEN: tl.constexpr):
    """Return fp32 values as operands of products: as is, or as a high and a low part in bf16."""
    if PARTS == 1:
        return (values,)
    else:
        high = values.to(tl.bfloat16)
        low = (values - high.to(tl.float32)).to(tl.bfloat16)
        if WIDEN:
            return (high.to(tl.float32), low.to(tl.float32))
        else:
            return (high, low)


@triton.jit
def _load_operand(ptr, offsets, mask, WIDEN: tl.constexpr):
    values = tl.load(ptr + offsets, mask=mask, other=0.0)
    if WIDEN:
        return values.to(tl.float32)
    else:
        return values


@triton.jit
def _products(
    x_ptr,
    first,
    valid,
    parts_ptr,
    part_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Return products (ROWS, HEADS) of rows of x with H vectors, and sums of x^2 (ROWS,).

    The vectors are (PARTS, H, D). `first` (ROWS, 1) is the offset of each row.
    """
    heads = tl.arange(0, HEADS)[:, None]
    products = tl.zeros([ROWS, HEADS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, D, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)[None, :]
        x = _load_operand(x_ptr, first + columns, _inside(valid, columns, D, BLOCK), WIDEN)
        if SQUARES:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        mask = _inside(heads < H, columns, D, BLOCK)
        for i in tl.static_range(PARTS):
            vectors = _load_operand(parts_ptr + i * part_stride, heads * D + columns, mask, WIDEN)
            products = tl.dot(x, tl.trans(vectors), products, input_precision="tf32x3")
    return products, squares


@triton.jit(do_not_specialize=COUNTS)
def scores_kernel(
    x_ptr,
    folded_ptr,
    scores_ptr,
    rstd_ptr,
    length,
    blocks,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program handles ROWS tokens of a sample. folded is (PARTS, H, D).

    scores (B, H, N) are -inf, and rstd (B, N) is 0, after the last token.
    """
    programs = blocks * (PAD // ROWS)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    row = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    valid = row < length
    first = (sample * length + row)[:, None] * D
    products, squares = _products(
        x_ptr, first, valid[:, None], folded_ptr, H * D,
        H, D, HEADS, ROWS, BLOCK, PARTS, WIDEN, STAGES, True,
    )  # fmt: skip
    rstd = tl.where(valid, 1.0 / tl.sqrt_rn(squares / D + eps), 0.0)
    scores = tl.where(valid[:, None], products * rstd[:, None], -float("inf"))
    heads = tl.arange(0, HEADS)[None, :]
    padded = blocks.to(tl.int64) * PAD
    tl.store(rstd_ptr + (sample * padded + row), rstd)
    at = (sample * H + heads) * padded + row[:, None]
    tl.store(scores_ptr + at, scores, mask=heads < H)


@triton.jit(do_not_specialize=COUNTS)
def weighted_sum_kernel(
    x_ptr,
    weights_ptr,
    lse_ptr,
    rstd_ptr,
    sums_ptr,
    length,
    blocks,
    splits,
    blocks_per_split,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The grid is (B P, blocks of channels). sums (B P, H, D): weighted sums of tokens per split.

    With lse (B, H) and rstd (B, N), weights (B, H, N) are scores, -inf after the last token. Else
    they are the weights themselves, 0 after the last token.
    """
    sample = (tl.program_id(0) // splits).to(tl.int64)
    begin = tl.program_id(0) % splits * blocks_per_split * PAD
    end = tl.minimum(begin + blocks_per_split * PAD, length)
    padded = blocks.to(tl.int64) * PAD
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    heads = tl.arange(0, HEADS)
    real = (heads < H)[None, :]
    if lse_ptr is not None:
        lse = tl.load(lse_ptr + (sample * H + heads), mask=heads < H, other=0.0)[None, :]
    sums = tl.zeros([BLOCK, HEADS], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        first = (sample * length + row)[None, :] * D
        mask = _inside((row < length)[None, :], columns[:, None], D, BLOCK)
        x = _load_operand(x_ptr, first + columns[:, None], mask, WIDEN)
        at = (sample * H + heads)[None, :] * padded + row[:, None]
        weights = tl.load(weights_ptr + at, mask=real, other=0.0)
        if lse_ptr is not None:
            rstd = tl.load(rstd_ptr + (sample * padded + row))
            weights = tl.exp(weights - lse) * rstd[:, None]
        operands = _split(weights, PARTS, WIDEN)
        for i in tl.static_range(PARTS):
            sums = tl.dot(x, operands[i], sums, input_precision="tf32x3")
    at = (tl.program_id(0).to(tl.int64) * H + heads)[None, :] * D + columns[:, None]
    tl.store(sums_ptr + at, sums, mask=_inside(real, columns[:, None], D, BLOCK))


@triton.jit(do_not_specialize=COUNTS)
def tokens_backward_kernel(
    grad_ptr,
    x_ptr,
    folded_ptr,
    scores_ptr,
    lse_ptr,
    delta_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_products_ptr,
    length,
    blocks,
    samples,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each program handles ROWS tokens of a sample. grad: (PARTS, B, H, D); folded: (PARTS, H, D).

    grad_products is du (B, H, N), 0 after the last token.
    """
    programs = blocks * (PAD // ROWS)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    row = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    valid = (row < length)[:, None]
    first = (sample * length + row)[:, None] * D
    grad_ptr += sample * H * D
    grad_stride = samples.to(tl.int64) * H * D
    grad_weights, _ = _products(
        x_ptr, first, valid, grad_ptr, grad_stride,
        H, D, HEADS, ROWS, BLOCK, PARTS, WIDEN, STAGES, False,
    )  # fmt: skip

    heads = tl.arange(0, HEADS)[None, :]
    real = heads < H
    padded = blocks.to(tl.int64) * PAD
    at = (sample * H + heads) * padded + row[:, None]
    lse = tl.load(lse_ptr + (sample * H + heads), mask=real, other=0.0)
    delta = tl.load(delta_ptr + (sample * H + heads), mask=real, other=0.0)
    rstd = tl.load(rstd_ptr + (sample * padded + row))[:, None]
    scores = tl.load(scores_ptr + at, mask=valid & real, other=0.0)
    p = tl.where(valid & real, tl.exp(scores - lse), 0.0)
    grad_p = grad_weights * rstd
    grad_scores = p * (grad_p - delta)
    through_norm = tl.sum(p * grad_p + grad_scores * scores, axis=1)[:, None] * rstd * rstd / D
    grad_products = grad_scores * rstd
    tl.store(grad_products_ptr + at, grad_products, mask=real)
    weights = _split(p * rstd, PARTS, WIDEN)
    slopes = _split(grad_products, PARTS, WIDEN)

    rows_of_heads = tl.arange(0, HEADS)[:, None]
    for start in tl.range(0, D, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)[None, :]
        mask = _inside(valid, columns, D, BLOCK)
        x = tl.load(x_ptr + (first + columns), mask=mask, other=0.0).to(tl.float32)
        grad_x = -through_norm * x
        of_head = _inside(rows_of_heads < H, columns, D, BLOCK)
        offsets = rows_of_heads * D + columns
        for i in tl.static_range(PARTS):
            grad = _load_operand(grad_ptr + i * grad_stride, offsets, of_head, WIDEN)
            folded = _load_operand(folded_ptr + i * H * D, offsets, of_head, WIDEN)
            for j in tl.static_range(PARTS - i):
                grad_x = tl.dot(weights[j], grad, grad_x, input_precision="tf32x3")
                grad_x = tl.dot(slopes[j], folded, grad_x, input_precision="tf32x3")
        tl.store(grad_x_ptr + (first + columns), grad_x, mask=mask)


class Tiling(NamedTuple):
    """How a kernel divides its work: tokens and channels per step or program, warps, loop stages.

    `rows` divides PAD. `registers` per thread is set where ptxas would choose fewer and spill a few
    values, for an occupancy that does not pay off.
    """

    rows: int
    block: int
    num_warps: int
    stages: int
    registers: int | None = None


# `heads` are padded. `itemsize` is that of operands: 2 for bf16, else 4, with three products for
# one. These tilings have the fewest warps without spills on any chip (benchmarks/aot).


def scores_tiling(heads: int, itemsize: int) -> Tiling:
    """Return a tiling whose steps read 128 bytes of each row."""
    registers = 128 if heads <= 32 else None
    return Tiling(PAD, 128 // itemsize, _warps(heads), stages=3, registers=registers)


def sum_tiling(heads: int, itemsize: int) -> Tiling:
    """Return a tiling with at most 32 sums per thread."""
    narrow = itemsize == 2
    return Tiling(
        PAD if narrow else PAD // 2,
        128 if narrow and heads < 128 else 64,
        _warps(heads),
        stages=2,
    )


def backward_tiling(heads: int, itemsize: int) -> Tiling:
    """Return a tiling that leaves registers for the weights of all heads and their gradients."""
    wide = itemsize == 4
    rows = PAD // 2 if wide and heads == 128 else PAD
    bytes_of_row = 128 if heads < (64 if wide else 128) else 64
    stages = 2 if rows == PAD else 1  # loading ahead takes registers
    return Tiling(rows, bytes_of_row // itemsize, _warps(heads), stages)


def _warps(heads: int) -> int:
    return 4 if heads <= 32 else 8


def _constants(x: Tensor, heads: int, tile: Callable[[int, int], Tiling]) -> dict[str, Any]:
    """Return compile-time arguments and options of a launch."""
    narrow = x.dtype == torch.bfloat16
    padded = max(16, triton.next_power_of_2(heads))
    tiling = tile(padded, 2 if narrow else 4)
    return {
        "H": heads,
        "D": x.shape[2],
        "HEADS": padded,
        "PAD": PAD,
        "ROWS": tiling.rows,
        "BLOCK": tiling.block,
        "PARTS": _num_parts(x),
        # The interpreter cannot multiply bf16
        "WIDEN": not narrow or interpreted(),
        "STAGES": tiling.stages,
        "num_warps": tiling.num_warps,
        "maxnreg": tiling.registers,
        "enable_fp_fusion": True,
    }


def _num_parts(x: Tensor) -> int:
    return 2 if x.dtype == torch.bfloat16 else 1


def _parts(values: Tensor, number: int) -> Tensor:
    """Return fp32 values (...) as operands (1, ...), or as two bf16 parts (2, ...) of their sum."""
    if number == 1:
        return values.unsqueeze(0).contiguous()
    high = values.to(torch.bfloat16)
    return torch.stack((high, (values - high).to(torch.bfloat16)))


def _blocks(length: int) -> int:
    return (length + PAD - 1) // PAD


def _forward(inputs: Pooling) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pooled (B, H, D), scores (B, H, N), lse (B, H) and rstd (B, N), all fp32."""
    x, folded = inputs.x.contiguous(), inputs.folded
    batch, length, _ = x.shape
    num_heads = folded.shape[0]
    blocks = _blocks(length)
    scores = folded.new_empty(batch, num_heads, blocks * PAD)
    rstd = folded.new_empty(batch, blocks * PAD)
    constants = _constants(x, num_heads, scores_tiling)
    if batch:
        with torch.cuda.device_of(x):
            scores_kernel[(batch * blocks * (PAD // constants["ROWS"]),)](
                x,
                _parts(folded, _num_parts(x)),
                scores,
                rstd,
                length,
                blocks,
                inputs.eps,
                **constants,
            )
    lse = scores.logsumexp(-1)
    return _weighted_sum(x, scores, lse, rstd, over_samples=False), scores, lse, rstd


def _weighted_sum(
    x: Tensor, weights: Tensor, lse: Tensor | None, rstd: Tensor | None, *, over_samples: bool
) -> Tensor:
    """Sum tokens by weights (B, H, N), or by scores with lse and rstd: (B, H, D), or (H, D)."""
    batch, length, width = x.shape
    num_heads = weights.shape[1]
    shape = (num_heads, width) if over_samples else (batch, num_heads, width)
    if batch == 0:
        return weights.new_zeros(shape)
    constants = _constants(x, num_heads, sum_tiling)
    columns = triton.cdiv(width, constants["BLOCK"])
    blocks = _blocks(length)
    per_split, splits = _share_out(x.device, batch * columns, blocks)
    partials = weights.new_empty(1, batch * splits, num_heads * width)
    with torch.cuda.device_of(x):
        weighted_sum_kernel[(batch * splits, columns)](
            x, weights, lse, rstd, partials, length, blocks, splits, per_split, **constants
        )
        return segment_sum(partials, None, 1 if over_samples else batch).view(shape)


def _share_out(device: torch.device, others: int, blocks: int) -> tuple[int, int]:
    """Return blocks of tokens per program, and the number of programs that share a sample."""
    wanted = max(1, 2 * num_processors(device) // others)
    # Each program writes H D sums in fp32, which is too much for few tokens
    per_program = max(triton.cdiv(blocks, wanted), 4)
    return per_program, triton.cdiv(blocks, per_program)


def _fake(inputs: Pooling) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, folded, _ = inputs
    batch, heads = x.shape[0], folded.shape[0]
    padded = _blocks(x.shape[1]) * PAD
    return (
        folded.new_empty(batch, heads, x.shape[2]),
        folded.new_empty(batch, heads, padded),
        folded.new_empty(batch, heads),
        folded.new_empty(batch, padded),
    )


class PoolingBackward(NamedTuple):
    """Inputs of the backward pass: inputs and outputs of the forward pass, and gradients."""

    grad: Tensor
    x: Tensor
    folded: Tensor
    pooled: Tensor
    scores: Tensor
    lse: Tensor
    rstd: Tensor
    grad_lse: Tensor | None
    folded_grad: bool


def _launch_backward(x: Tensor, inputs: PoolingBackward) -> tuple[Tensor, Tensor]:
    """Return gradients of x, contiguous, and of its products with folded queries, du (B, H, N)."""
    batch, length, _ = x.shape
    grad_x, grad_products = torch.empty_like(x), torch.empty_like(inputs.scores)
    if batch == 0:
        return grad_x, grad_products
    constants = _constants(x, inputs.folded.shape[0], backward_tiling)
    blocks, number = _blocks(length), _num_parts(x)
    grad = inputs.grad.contiguous()
    delta = torch.linalg.vecdot(grad, inputs.pooled)
    if inputs.grad_lse is not None:  # d lse / ds = p: the same as adding it to dp
        delta = delta - inputs.grad_lse
    with torch.cuda.device_of(x):
        tokens_backward_kernel[(batch * blocks * (PAD // constants["ROWS"]),)](
            _parts(grad, number),
            x,
            _parts(inputs.folded, number),
            inputs.scores,
            inputs.lse,
            delta,
            inputs.rstd,
            grad_x,
            grad_products,
            length,
            blocks,
            batch,
            **constants,
        )
    return grad_x, grad_products


def _backward(inputs: PoolingBackward) -> tuple[Tensor, Tensor]:
    """Return gradients of x and of the folded queries; (0,) for the latter if not needed."""
    x, rstd = inputs.x.contiguous(), inputs.rstd
    grad_x, grad_products = _launch_backward(x, inputs)
    if not inputs.folded_grad:
        return grad_x, inputs.folded.new_empty(0)
    of_folded = _weighted_sum(x, grad_products, None, None, over_samples=True)
    # Gradients of scores sum to 0, except for the rounding of delta and dp. The remainder would
    # enter with the weights of the whole sum, and the true gradient may be far smaller.
    per_token = rstd.reciprocal().masked_fill(rstd == 0, 0.0)  # padding
    rest = torch.einsum("bhn,bn->bh", grad_products, per_token)
    if inputs.grad_lse is not None:  # the sum is then grad_lse
        rest = rest - inputs.grad_lse
    return grad_x, of_folded - torch.einsum("bh,bhd->hd", rest, inputs.pooled)


def _fake_backward(inputs: PoolingBackward) -> tuple[Tensor, Tensor]:
    x, folded = inputs.x, inputs.folded
    return x.new_empty(x.shape), folded.new_empty(folded.shape if inputs.folded_grad else 0)


query_pooling_backward_op = backward_op(
    "apt::query_pooling_backward", _backward, fake=_fake_backward, ops="query_pooling"
)


def _save(ctx: Any, inputs: Pooling, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs.x, inputs.folded, *output)
    _, scores, _, rstd = output
    ctx.mark_non_differentiable(scores, rstd)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad: Tensor | None, _scores: None, grad_lse: Tensor | None, _rstd: None
) -> tuple[Tensor, Tensor | None, None]:
    wanted = ctx.needs_input_grad[1]
    saved = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(saved[2])
    inputs = PoolingBackward._make((grad, *saved, grad_lse, wanted))
    of_x, of_folded = query_pooling_backward_op(inputs)
    return of_x, of_folded if wanted else None, None


query_pooling_op = FusedOp(
    "apt::query_pooling", _forward, fake=_fake, save=_save, gradient=_gradients
)


def pool(inputs: Pooling) -> Tensor:
    """Call the op, without checks; return pooled (B, H, D) fp32."""
    pooled: Tensor = query_pooling_op(inputs)[0]
    return pooled


def pool_parts(inputs: Pooling) -> tuple[Tensor, Tensor]:
    """Return the same, and the logarithm of the sum of the scores' exponentials, (B, H) fp32."""
    pooled, _, lse, _ = query_pooling_op(inputs)
    return pooled, lse
