"""Kernels of `modulated_norm` and `residual_modulated_norm`, forward and backward.

A program holds whole rows of x in registers, so that each tensor is read or written once. A row of
D channels is cut into two tiles: the largest power of two that fits, and the power of two that
covers the rest (3072 = 2048 + 1024). A single padded tile would waste a quarter of its lanes.

    x_hat = (x - mean) * rstd;   n = x_hat * weight + bias;   y = n * (1 + scale) + shift
    g     = dL/dy * (1 + scale) * weight
    dL/dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat))      an RMS norm: mean = 0, without avg(g)

Gradients of values that several tokens share are sums over those tokens. Each program sums over its
own tokens, and `segment_sum` adds the sums of programs. There are no atomics, so results are the
same bit for bit in every run.

Shapes: B samples, L tokens, D channels, M = B * L tokens in all, R condition rows, P programs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Numbers that change from batch to batch. Not specialised: multiples of 16 need no new compilation.
COUNTS = ("num_tokens", "tokens_per_sample", "tokens_per_program", "programs_per_sample")


@triton.jit
def _columns(i: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    if i == 0:
        return tl.arange(0, MAIN)[None, :]
    else:
        return MAIN + tl.arange(0, REST)[None, :]


@triton.jit
def _mask(i: tl.constexpr, valid, columns, D: tl.constexpr, WIDTH: tl.constexpr):
    """Return None if no lane can be out of bounds: predicates cost registers and instructions."""
    if i == 1 and WIDTH != D:
        return valid & (columns < D)
    elif valid.shape[0] == 1:
        return  # not `return None`, which Triton 3.6 turns into a tensor
    else:
        return valid


@triton.jit
def _in_row(i: tl.constexpr, columns, D: tl.constexpr, WIDTH: tl.constexpr):
    """As `_mask`, for tensors without an axis of tokens."""
    if i == 1 and WIDTH != D:
        return columns < D
    else:
        return  # not `return None`, which Triton 3.6 turns into a tensor


@triton.jit
def _load(ptr, offsets, mask):
    if mask is None:
        return tl.load(ptr + offsets).to(tl.float32)
    else:
        return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _condition_row(token, rows_ptr, valid, tokens_per_sample, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        return token.to(tl.int64)
    elif rows_ptr is None:
        return (token // tokens_per_sample).to(tl.int64)
    else:
        return tl.load(rows_ptr + token // tokens_per_sample, mask=valid, other=0)


@triton.jit(do_not_specialize=COUNTS[:2])
def forward_kernel(
    x_ptr,
    update_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    x_new_ptr,
    y_ptr,
    stats_ptr,
    num_tokens,
    tokens_per_sample,
    eps,
    GATE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SHIFT_STRIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    LAYER: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    TOKENS: tl.constexpr,
):
    TILES: tl.constexpr = 2 if REST else 1
    WIDTH: tl.constexpr = MAIN + REST
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = token < num_tokens
    row = _condition_row(token, rows_ptr, valid, tokens_per_sample, PER_TOKEN)[:, None]
    first = token.to(tl.int64)[:, None] * D

    x = ()
    total = tl.zeros([TOKENS], tl.float32)
    for i in tl.static_range(TILES):
        columns = _columns(i, MAIN, REST)
        mask = _mask(i, valid[:, None], columns, D, WIDTH)
        tile = _load(x_ptr, first + columns, mask)
        if update_ptr is not None:
            gate = _load(gate_ptr, row * GATE_STRIDE + columns, mask)
            tile += gate * _load(update_ptr, first + columns, mask)
            rounded = tile.to(x_new_ptr.dtype.element_ty)
            tl.store(x_new_ptr + first + columns, rounded, mask=mask)
            tile = rounded.to(tl.float32)  # y is computed from x_new after its rounding
        total += tl.sum(tile, axis=1)
        x += (tile,)

    if LAYER:
        mean = total / D
        tl.store(stats_ptr + num_tokens + token.to(tl.int64), mean, mask=valid)
    else:
        mean = tl.zeros([TOKENS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for i in tl.static_range(TILES):
        centred = x[i] - mean[:, None]
        if LAYER and i == 1 and WIDTH != D:  # lanes past the end would count as -mean
            centred = tl.where(_columns(i, MAIN, REST) < D, centred, 0.0)
        squares += tl.sum(centred * centred, axis=1)
    rstd = 1.0 / tl.sqrt_rn(squares / D + eps)
    tl.store(stats_ptr + token, rstd, mask=valid)

    for i in tl.static_range(TILES):
        columns = _columns(i, MAIN, REST)
        mask = _mask(i, valid[:, None], columns, D, WIDTH)
        in_row = _in_row(i, columns, D, WIDTH)
        n = (x[i] - mean[:, None]) * rstd[:, None]
        if weight_ptr is not None:
            n *= _load(weight_ptr, columns, in_row)
        if bias_ptr is not None:
            n += _load(bias_ptr, columns, in_row)
        scale = _load(scale_ptr, row * SCALE_STRIDE + columns, mask)
        shift = _load(shift_ptr, row * SHIFT_STRIDE + columns, mask)
        tl.store(y_ptr + first + columns, n * (1.0 + scale) + shift, mask=mask)


@triton.jit
def _zeros(TOKENS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    if REST:
        return (tl.zeros([TOKENS, MAIN], tl.float32), tl.zeros([TOKENS, REST], tl.float32))
    else:
        return (tl.zeros([TOKENS, MAIN], tl.float32),)


@triton.jit
def _shared_tiles(ptr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Load a row of D values, cut into tiles."""
    tiles = ()
    for i in tl.static_range(2 if REST else 1):
        columns = _columns(i, MAIN, REST)
        tiles += (_load(ptr, columns, _in_row(i, columns, D, MAIN + REST)),)
    return tiles


@triton.jit
def _shared_factors(scale_ptr, weight_ptr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Load (1 + scale) * weight, cut into tiles."""
    tiles = ()
    for i in tl.static_range(2 if REST else 1):
        columns = _columns(i, MAIN, REST)
        in_row = _in_row(i, columns, D, MAIN + REST)
        tile = 1.0 + _load(scale_ptr, columns, in_row)
        if weight_ptr is not None:
            tile *= _load(weight_ptr, columns, in_row)
        tiles += (tile,)
    return tiles


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_y_ptr,
    grad_x_new_ptr,
    x_ptr,
    update_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    stats_ptr,
    grad_x_ptr,
    grad_update_ptr,
    grad_gate_ptr,
    grad_scale_ptr,
    partials_ptr,
    num_tokens,
    tokens_per_sample,
    tokens_per_program,
    programs_per_sample,
    GATE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    LAYER: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP_SHARED: tl.constexpr,
    KEEP_X: tl.constexpr,
):
    """x is the input of the norm: x_new if there is an update.

    partials (K, P, D) are None if not needed. If tokens share the modulation, they are sums over
    the program's tokens of d y * x_hat, of d y, and of d x_new * update. Else they are the first
    two, with d y * (1 + scale) instead of d y.
    """
    TILES: tl.constexpr = 2 if REST else 1
    WIDTH: tl.constexpr = MAIN + REST
    SUM_GATE: tl.constexpr = partials_ptr is not None and update_ptr is not None and not PER_TOKEN
    program = tl.program_id(0)
    sample = program // programs_per_sample
    begin = sample * tokens_per_sample
    end = tl.minimum(
        begin + (program % programs_per_sample + 1) * tokens_per_program, begin + tokens_per_sample
    )
    begin += program % programs_per_sample * tokens_per_program

    row = sample.to(tl.int64) if rows_ptr is None else tl.load(rows_ptr + sample)
    factors = ()
    gates = ()
    if KEEP_SHARED:
        factors = _shared_factors(scale_ptr + row * SCALE_STRIDE, weight_ptr, D, MAIN, REST)
        if update_ptr is not None:
            gates = _shared_tiles(gate_ptr + row * GATE_STRIDE, D, MAIN, REST)
    sums_xy = _zeros(TOKENS, MAIN, REST)
    sums_y = _zeros(TOKENS, MAIN, REST)
    sums_gate = _zeros(TOKENS, MAIN, REST)

    for start in tl.range(begin, end, TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, TOKENS)
        valid = token < end
        first = token.to(tl.int64)[:, None] * D
        rstd = _load(stats_ptr, token, valid)[:, None]
        mean = _load(stats_ptr + num_tokens, token.to(tl.int64), valid)[:, None] if LAYER else 0.0
        modulation = token.to(tl.int64)[:, None] if PER_TOKEN else row

        x_hats = ()
        gs = ()
        new_xy = ()
        new_y = ()
        dot = tl.zeros([TOKENS], tl.float32)
        total = tl.zeros([TOKENS], tl.float32)
        for i in tl.static_range(TILES):
            columns = _columns(i, MAIN, REST)
            mask = _mask(i, valid[:, None], columns, D, WIDTH)
            in_row = _in_row(i, columns, D, WIDTH)
            x_hat = (_load(x_ptr, first + columns, mask) - mean) * rstd
            grad_y = _load(grad_y_ptr, first + columns, mask)
            if KEEP_SHARED:
                g = grad_y * factors[i]
            else:
                scaled = 1.0 + _load(scale_ptr, modulation * SCALE_STRIDE + columns, mask)
                g = grad_y * scaled
                if weight_ptr is not None:
                    g *= _load(weight_ptr, columns, in_row)
            shared = grad_y
            if PER_TOKEN:
                shared *= scaled
                if grad_scale_ptr is not None:
                    n = x_hat
                    if weight_ptr is not None:
                        n *= _load(weight_ptr, columns, in_row)
                    if bias_ptr is not None:
                        n += _load(bias_ptr, columns, in_row)
                    tl.store(grad_scale_ptr + first + columns, grad_y * n, mask=mask)
            if partials_ptr is not None:
                new_xy += (sums_xy[i] + shared * x_hat,)
                new_y += (sums_y[i] + shared,)
            dot += tl.sum(g * x_hat, axis=1)
            total += tl.sum(g, axis=1)
            if KEEP_X:
                x_hats += (x_hat,)
            gs += (g,)
        if partials_ptr is not None:
            sums_xy = new_xy
            sums_y = new_y

        dot = (dot / D)[:, None]
        total = (total / D)[:, None]
        new_gate = ()
        for i in tl.static_range(TILES):
            columns = _columns(i, MAIN, REST)
            mask = _mask(i, valid[:, None], columns, D, WIDTH)
            if KEEP_X:
                x_hat = x_hats[i]
            else:  # the cache modifier keeps the compiler from merging this load with the first
                x_hat = tl.load(x_ptr + first + columns, mask=mask, cache_modifier=".ca")
                x_hat = (x_hat.to(tl.float32) - mean) * rstd
            grad = gs[i] - x_hat * dot
            if LAYER:
                grad -= total
            grad *= rstd
            if grad_x_new_ptr is not None:
                grad += _load(grad_x_new_ptr, first + columns, mask)
            tl.store(grad_x_ptr + first + columns, grad, mask=mask)
            if update_ptr is not None:
                if KEEP_SHARED:
                    gate = gates[i]
                else:
                    gate = _load(gate_ptr, modulation * GATE_STRIDE + columns, mask)
                tl.store(grad_update_ptr + first + columns, grad * gate, mask=mask)
                if SUM_GATE or grad_gate_ptr is not None:
                    product = grad * _load(update_ptr, first + columns, mask)
                    if SUM_GATE:
                        new_gate += (sums_gate[i] + product,)
                    else:
                        tl.store(grad_gate_ptr + first + columns, product, mask=mask)
        if SUM_GATE:
            sums_gate = new_gate

    if partials_ptr is not None:
        programs = tl.num_programs(0).to(tl.int64)
        for i in tl.static_range(TILES):
            columns = _columns(i, MAIN, REST)
            in_row = _in_row(i, columns, D, WIDTH)
            at = partials_ptr + program.to(tl.int64) * D + columns
            tl.store(at, tl.sum(sums_xy[i], axis=0)[None, :], mask=in_row)
            tl.store(at + programs * D, tl.sum(sums_y[i], axis=0)[None, :], mask=in_row)
            if SUM_GATE:
                at += 2 * programs * D
                tl.store(at, tl.sum(sums_gate[i], axis=0)[None, :], mask=in_row)


class Tiling(NamedTuple):
    """How a kernel divides its work: two tiles of columns, tokens per step, warps, loop stages.

    `registers` per thread is set where ptxas would choose fewer and spill a few values, for an
    occupancy that does not pay off.
    """

    main: int
    rest: int
    tokens: int
    num_warps: int
    stages: int = 1
    registers: int | None = None


def forward_tiling(width: int, per_token: bool) -> Tiling:
    """Return a tiling with 16 values of a wide row per thread."""
    main, rest, tokens = _split(width)
    limit = 128 if per_token and main == 2048 and 0 < rest <= 512 else None
    return Tiling(main, rest, tokens, num_warps=max(4, main // 512), registers=limit)


def backward_tiling(width: int, num_tensors: int, itemsize: int, per_token: bool) -> Tiling:
    """Return a tiling with fewer values per thread: sums and modulation are in registers, too.

    A program of 8 or 16 warps has a multiprocessor nearly to itself. It therefore loads the next
    token of the `num_tensors` (M, D) inputs ahead, if that fits into 64 KiB of shared memory.
    """
    main, rest, tokens = _split(width)
    padded = main + rest
    if padded > WIDE:  # loading ahead would spill
        return Tiling(main, rest, tokens, num_warps=32 if itemsize == 4 or per_token else 16)
    num_warps = next(n for most, n in BACKWARD_WARPS if padded <= most)
    ahead = num_warps > 4 and num_tensors * padded * itemsize <= 2**16
    limit = 128 if num_warps == 4 and main == 1024 and num_tensors < 4 else None
    return Tiling(main, rest, tokens, num_warps, stages=2 if ahead else 1, registers=limit)


# (largest padded width, warps): the fewest warps without spills in any variant (benchmarks/aot)
BACKWARD_WARPS = ((1536, 4), (3072, 8), (5120, 16))
WIDE = 5120  # wider rows keep less in registers, and read it from L1 again for each token


def keeps_shared(tiling: Tiling, residual: bool, per_token: bool) -> bool:
    """Return whether shared modulation stays in registers: with a gate, 5120 values would spill."""
    return tiling.main + tiling.rest <= (4096 if residual else WIDE) and not per_token


def _split(width: int) -> tuple[int, int, int]:
    main = 1 << (width.bit_length() - 1)
    rest = 0 if main == width else triton.next_power_of_2(width - main)
    return main, rest, max(1, 1024 // main)
