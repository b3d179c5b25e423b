"""`modulated_norm` and `residual_modulated_norm` in Triton, forward and backward.

A program holds whole rows of x in registers, so that each tensor crosses device memory once. A row
of D channels is cut into two tiles, the largest power of two and the power of two that covers the
rest (3072 = 2048 + 1024): one padded tile would spend a quarter of its lanes on nothing.

    x_hat = (x - mean) * rstd;   n = x_hat * weight + bias;   y = n * (1 + scale) + shift
    g     = dL/dy * (1 + scale) * weight
    dL/dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat))      an RMS norm: mean = 0, without avg(g)

Gradients of what several tokens share are sums over those tokens: each program adds up its own,
`segment_sum` adds those of programs. No atomics, so results repeat bit for bit.

Shapes: B samples, L tokens, D channels, M = B * L tokens in all, R condition rows, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt.kernels._triton.common import no_double_backward, num_processors, save_nothing
from apt.kernels._triton.fused_op import fused_op
from apt.kernels._triton.segment_sum import segment_sum

# Numbers that change from batch to batch: no new compilation for those that 16 divides.
COUNTS = ("num_tokens", "tokens_per_sample", "tokens_per_program", "programs_per_sample")


@triton.jit
def _columns(i: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    if i == 0:
        return tl.arange(0, MAIN)[None, :]
    else:
        return MAIN + tl.arange(0, REST)[None, :]


@triton.jit
def _mask(i: tl.constexpr, valid, columns, D: tl.constexpr, WIDTH: tl.constexpr):
    """None where no lane can be out of bounds: predicates cost registers and instructions."""
    if i == 1 and WIDTH != D:
        return valid & (columns < D)
    elif valid.shape[0] == 1:
        return  # and not `return None`, of which Triton 3.6 makes a tensor
    else:
        return valid


@triton.jit
def _in_row(i: tl.constexpr, columns, D: tl.constexpr, WIDTH: tl.constexpr):
    """As `_mask`, for what has no axis of tokens."""
    if i == 1 and WIDTH != D:
        return columns < D
    else:
        return  # and not `return None`, of which Triton 3.6 makes a tensor


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
            tile = rounded.to(tl.float32)  # y follows from x_new as it is stored
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
    """A row of D values, cut into tiles."""
    tiles = ()
    for i in tl.static_range(2 if REST else 1):
        columns = _columns(i, MAIN, REST)
        tiles += (_load(ptr, columns, _in_row(i, columns, D, MAIN + REST)),)
    return tiles


@triton.jit
def _shared_factors(scale_ptr, weight_ptr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """(1 + scale) * weight, cut into tiles."""
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
    """x is what was normed: x_new, where there is an update.

    partials (K, P, D), if the caller wants them: sums over the program's tokens of d y * x_hat, of
    d y, and of d x_new * update, where the modulation is shared by tokens; else the first two, with
    d y * (1 + scale) for d y.
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
            else:  # with a cache modifier, or the compiler would make one load of the two
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
    """How a kernel cuts its work: two tiles of columns, tokens per step, warps, loop stages.

    `registers` per thread, where ptxas would otherwise choose fewer, for an occupancy that does not
    pay, and spill a few values to keep to it.
    """

    main: int
    rest: int
    tokens: int
    num_warps: int
    stages: int = 1
    registers: int | None = None


def forward_tiling(width: int, per_token: bool) -> Tiling:
    """16 values of a wide row per thread."""
    main, rest, tokens = _split(width)
    limit = 128 if per_token and main == 2048 and 0 < rest <= 512 else None
    return Tiling(main, rest, tokens, num_warps=max(4, main // 512), registers=limit)


def backward_tiling(width: int, num_tensors: int, itemsize: int, per_token: bool) -> Tiling:
    """Sums and shared modulation stay in registers as well, hence fewer values per thread.

    A program of 8 or 16 warps has a multiprocessor nearly to itself, so it loads the next token of
    the `num_tensors` (M, D) inputs while it works, if 64 KiB of shared memory will do.
    """
    main, rest, tokens = _split(width)
    padded = main + rest
    if padded > WIDE:  # loading ahead would spill
        return Tiling(main, rest, tokens, num_warps=32 if itemsize == 4 or per_token else 16)
    num_warps = next(n for most, n in BACKWARD_WARPS if padded <= most)
    ahead = num_warps > 4 and num_tensors * padded * itemsize <= 2**16
    limit = 128 if num_warps == 4 and main == 1024 and num_tensors < 4 else None
    return Tiling(main, rest, tokens, num_warps, stages=2 if ahead else 1, registers=limit)


# (padded width up to, warps): the fewest that spill nothing in any variant (benchmarks/aot)
BACKWARD_WARPS = ((1536, 4), (3072, 8), (5120, 16))
WIDE = 5120  # wider rows keep less in registers, and read it again for each token, from L1


def _keeps_shared(tiling: Tiling, residual: bool, per_token: bool) -> bool:
    """Whether shared modulation stays in registers: with a gate, rows of 5120 would spill."""
    return tiling.main + tiling.rest <= (4096 if residual else WIDE) and not per_token


def _split(width: int) -> tuple[int, int, int]:
    main = 1 << (width.bit_length() - 1)
    rest = 0 if main == width else triton.next_power_of_2(width - main)
    return main, rest, max(1, 1024 // main)


def _matrix(values: Tensor | None) -> Tensor | None:
    """(..., D) as a matrix with dense rows; a copy only if its strides do not allow a view."""
    if values is None:
        return None
    rows = values.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _row_stride(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)


def _forward(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    eps: float,
    layer: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x_new if there is an update, y, and (1 or 2, M) fp32: rstd, and mean of a layer norm."""
    per_token = scale.ndim == 3
    x = x.contiguous()
    x_new = None if update is None else torch.empty_like(x)
    y = torch.empty_like(x)
    num_tokens, width = x.shape[0] * x.shape[1], x.shape[2]
    stats = x.new_empty(2 if layer else 1, num_tokens, dtype=torch.float32)
    if num_tokens == 0:
        return x_new, y, stats
    gate, scale, shift = _matrix(gate), _matrix(scale), _matrix(shift)
    tiling = forward_tiling(width, per_token)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(num_tokens, tiling.tokens),)](
            x,
            _contiguous(update),
            gate,
            scale,
            shift,
            _contiguous(weight),
            _contiguous(bias),
            _contiguous(rows),
            x_new,
            y,
            stats,
            num_tokens,
            x.shape[1],
            eps,
            GATE_STRIDE=_row_stride(gate),
            SCALE_STRIDE=_row_stride(scale),
            SHIFT_STRIDE=_row_stride(shift),
            PER_TOKEN=per_token,
            LAYER=layer,
            D=width,
            MAIN=tiling.main,
            REST=tiling.rest,
            TOKENS=tiling.tokens,
            num_warps=tiling.num_warps,
            maxnreg=tiling.registers,
            enable_fp_fusion=True,
        )
    return x_new, y, stats


def _backward(
    grad_y: Tensor,
    grad_x_new: Tensor | None,
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    stats: Tensor,
    layer: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and update, of gate and scale if per token, and sums (K, R, D) fp32.

    Per token R = 1, and there are sums only if there is a weight or a bias.
    """
    per_token, num_rows = scale.ndim == 3, scale.shape[0]
    batch, length, width = x.shape
    if per_token:  # all tokens share weight and bias, and nothing else
        batch, length, num_rows = 1, batch * length, 1
    x = x.contiguous()
    grad_x = torch.empty_like(x)
    grad_update = None if update is None else torch.empty_like(x, dtype=update.dtype)
    grad_gate = grad_scale = partials = None
    if modulation_grad and per_token:
        grad_scale = torch.empty_like(x, dtype=scale.dtype)
        grad_gate = None if gate is None else torch.empty_like(x, dtype=gate.dtype)
    num_tensors = 2 + 2 * (update is not None)
    num_tensors += (1 + (update is not None)) * per_token
    tiling = backward_tiling(width, num_tensors, x.element_size(), per_token)
    per_program, programs = _share_out(x.device, batch, length, tiling)
    num_sums = _number_of_sums(update, weight, bias, per_token) if modulation_grad else 0
    if num_sums:
        partials = x.new_empty(num_sums, batch * programs, width, dtype=torch.float32)
    if x.numel() == 0:
        sums = x.new_zeros(num_sums, num_rows, width, dtype=torch.float32) if num_sums else None
        return grad_x, grad_update, grad_gate, grad_scale, sums
    gate, scale = _matrix(gate), _matrix(scale)
    with torch.cuda.device_of(x):
        backward_kernel[(batch * programs,)](
            grad_y.contiguous(),
            _contiguous(grad_x_new),
            x,
            _contiguous(update),
            gate,
            scale,
            _contiguous(weight),
            _contiguous(bias),
            _contiguous(rows),
            stats,
            grad_x,
            grad_update,
            grad_gate,
            grad_scale,
            partials,
            batch * length,
            length,
            per_program,
            programs,
            GATE_STRIDE=_row_stride(gate),
            SCALE_STRIDE=_row_stride(scale),
            PER_TOKEN=per_token,
            LAYER=layer,
            D=width,
            MAIN=tiling.main,
            REST=tiling.rest,
            TOKENS=tiling.tokens,
            STAGES=tiling.stages,
            KEEP_SHARED=_keeps_shared(tiling, update is not None, per_token),
            KEEP_X=tiling.main + tiling.rest <= WIDE or tiling.num_warps == 32,
            num_warps=tiling.num_warps,
            maxnreg=tiling.registers,
            enable_fp_fusion=True,
        )
        sums = None if partials is None else segment_sum(partials, rows, num_rows)
    return grad_x, grad_update, grad_gate, grad_scale, sums


def _number_of_sums(
    update: Tensor | None, weight: Tensor | None, bias: Tensor | None, per_token: bool
) -> int:
    if per_token:
        return 0 if weight is None and bias is None else 2
    return 2 if update is None else 3


def _share_out(device: torch.device, samples: int, length: int, tiling: Tiling) -> tuple[int, int]:
    """Tokens per program, and programs per sample: each program stays within one sample."""
    wanted = triton.cdiv(num_processors(device) * max(1, 32 // tiling.num_warps), max(samples, 1))
    # Each program writes a row of sums in fp32: few tokens would not be worth that.
    tokens = max(triton.cdiv(length, wanted), 16, tiling.tokens)
    tokens = triton.cdiv(tokens, tiling.tokens) * tiling.tokens
    return tokens, triton.cdiv(length, tokens)


# Ops of torch.library, opaque to compilers: `triton_op`, which is not, cannot trace interpreted
# kernels, and these have nothing left to fuse.


@fused_op("apt::modulated_norm")
def modulated_norm_op(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor]:
    _, y, stats = _forward(x, None, None, scale, shift, weight, bias, rows, eps, layer)
    return y, stats


@modulated_norm_op.register_fake
def _(x, scale, shift, weight, bias, rows, eps, layer):
    return x.new_empty(x.shape), _fake_stats(x, layer)


@fused_op("apt::residual_modulated_norm")
def residual_modulated_norm_op(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x_new, y, stats = _forward(x, update, gate, scale, shift, weight, bias, rows, eps, layer)
    assert x_new is not None
    return x_new, y, stats


@residual_modulated_norm_op.register_fake
def _(x, update, gate, scale, shift, weight, bias, rows, eps, layer):
    return x.new_empty(x.shape), x.new_empty(x.shape), _fake_stats(x, layer)


def _fake_stats(x: Tensor, layer: bool) -> Tensor:
    return x.new_empty(2 if layer else 1, x.shape[0] * x.shape[1], dtype=torch.float32)


@fused_op("apt::modulated_norm_backward")
def backward_op(
    grad_y: Tensor,
    grad_x_new: Tensor | None,
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    stats: Tensor,
    layer: bool,
    modulation_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_backward` returns; (0,) for what is None."""
    grad_x, *others = _backward(
        grad_y, grad_x_new, x, update, gate, scale, weight, bias, rows, stats, layer,
        modulation_grad,
    )  # fmt: skip
    grad_update, grad_gate, grad_scale, sums = (_or_empty(other, x) for other in others)
    return grad_x, grad_update, grad_gate, grad_scale, sums


def _or_empty(gradient: Tensor | None, x: Tensor) -> Tensor:
    """Ops of torch.library cannot return None."""
    return x.new_empty(0) if gradient is None else gradient


@backward_op.register_fake
def _(
    grad_y, grad_x_new, x, update, gate, scale, weight, bias, rows, stats, layer, modulation_grad
):
    def like(values):
        return x.new_empty(0) if values is None else values.new_empty(values.shape)

    per_token = scale.ndim == 3
    num_sums = _number_of_sums(update, weight, bias, per_token) if modulation_grad else 0
    num_rows = 1 if per_token else scale.shape[0]
    return (
        like(x),
        like(update),
        like(gate if per_token and modulation_grad else None),
        like(scale if per_token and modulation_grad else None),
        x.new_empty((num_sums, num_rows, x.shape[2]) if num_sums else 0, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For both ops, which differ by update and gate."""
    *streams, scale, shift, weight, bias, rows, _, layer = inputs
    x, update, gate = streams if len(streams) == 3 else (streams[0], None, None)
    *_, stats = output
    ctx.save_for_backward(
        x if update is None else output[0], update, gate, scale, weight, bias, rows, stats
    )
    ctx.layer, ctx.shift_dtype = layer, shift.dtype
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_y: Tensor | None, grad_x_new: Tensor | None, modulation_grad: bool
) -> tuple[Tensor | None, ...]:
    """Of x, update, gate, scale, shift, weight, bias."""
    x, update, gate, scale, weight, bias, rows, stats = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_x, grad_update, grad_gate, grad_scale, sums = backward_op(
        grad_y, grad_x_new, x, update, gate, scale, weight, bias, rows, stats, ctx.layer,
        modulation_grad,
    )  # fmt: skip
    grad_shift = grad_weight = grad_bias = factor = None
    if not modulation_grad:
        return (grad_x, grad_update, *[None] * 5)
    by_quantity: Any = sums.unbind() if sums.ndim == 3 else (None, None)
    x_hat_times, ones_times, *of_gate = by_quantity
    if scale.ndim == 3:
        grad_shift = grad_y.to(ctx.shift_dtype)
    else:
        grad_scale = x_hat_times if weight is None else x_hat_times * weight
        grad_scale = grad_scale if bias is None else grad_scale + ones_times * bias
        grad_scale, grad_shift = grad_scale.to(scale.dtype), ones_times.to(ctx.shift_dtype)
        grad_gate = of_gate[0].to(gate.dtype) if of_gate else None
        factor = None if weight is None and bias is None else 1 + scale.float()
    if weight is not None:
        grad_weight = _weighted_sum(x_hat_times, factor).to(weight.dtype)
    if bias is not None:
        grad_bias = _weighted_sum(ones_times, factor).to(bias.dtype)
    return grad_x, grad_update, grad_gate, grad_scale, grad_shift, grad_weight, grad_bias


def _weighted_sum(sums: Tensor, factor: Tensor | None) -> Tensor:
    return (sums if factor is None else factor * sums).sum(0)


def _modulated_norm_backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Any, ...]:
    wanted = any(ctx.needs_input_grad[1:5])
    grad_x, _, _, *of_modulation = _gradients(ctx, grad_y, None, wanted)
    return (grad_x, *of_modulation, None, None, None)


def _residual_modulated_norm_backward(
    ctx: Any, grad_x_new: Tensor | None, grad_y: Tensor | None, _: None
) -> tuple[Any, ...]:
    wanted = any(ctx.needs_input_grad[2:7])
    return (*_gradients(ctx, grad_y, grad_x_new, wanted), None, None, None)


modulated_norm_op.register_autograd(_modulated_norm_backward, setup_context=_save)
residual_modulated_norm_op.register_autograd(_residual_modulated_norm_backward, setup_context=_save)
backward_op.register_autograd(
    no_double_backward("modulated_norm and residual_modulated_norm"), setup_context=save_nothing
)


def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer: bool,
    eps: float,
    rows: Tensor | None,
) -> Tensor:
    """The op, without checks."""
    scale, shift = _alike(x, scale, shift)
    return modulated_norm_op(x, scale, shift, weight, bias, rows, eps, layer)[0]


def residual_modulated_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer: bool,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op, without checks."""
    gate, scale, shift = _alike(x, gate, scale, shift)
    x_new, y, _ = residual_modulated_norm_op(
        x, update, gate, scale, shift, weight, bias, rows, eps, layer
    )
    return x_new, y


def _alike(x: Tensor, *modulation: Tensor) -> tuple[Tensor, ...]:
    """All per row, or all per token: kernels do not mix them."""
    if all(values.ndim == 2 for values in modulation):
        return modulation
    return tuple(v if v.ndim == 3 else v[:, None].expand(x.shape) for v in modulation)
