"""Kernels of `norm_rope`, `qk_norm_rope` and `joint_qk_norm_rope`, forward and backward.

The norm is over a row of W channels: a head (W = Dh, H rows per token), or all heads of a token
(W = H Dh, one row). Kernels compute on pairs (a, b) of channels that are rotated together; the
layout of pairs in a row only affects loads and stores. A row of W / 2 pairs is cut into two tiles:
the largest power of two that fits, and the power of two that covers the rest, as in
`norm_kernels`.

    x_hat = x * rstd;   n = x_hat * weight;   y = (na cos - nb sin, na sin + nb cos)
    g     = (dya cos + dyb sin, dyb cos - dya sin)        the inverse rotation
    dL/dweight = sum of g * x_hat over rows
    dL/dx      = rstd * (g * weight - x_hat * avg(g * weight * x_hat))

rstd is computed again in the backward pass, which reads x anyway.

One launch handles a stream: the second axis of its grid is q, k and v; v is only copied.

Shapes: B samples, L tokens, H heads, Dh channels per head, P programs.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Numbers that change from batch to batch. Not specialised: multiples of 16 need no new compilation.
COUNTS = ("num_rows", "length", "rows_per_program")


@triton.jit
def _pairs(i: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    if i == 0:
        return tl.arange(0, MAIN)[None, :]
    else:
        return MAIN + tl.arange(0, REST)[None, :]


@triton.jit
def _channels(i: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    if i == 0:
        return tl.arange(0, 2 * MAIN)[None, :]
    else:
        return 2 * MAIN + tl.arange(0, 2 * REST)[None, :]


@triton.jit
def _mask(i: tl.constexpr, valid, columns, NUM: tl.constexpr, PADDED: tl.constexpr):
    """Return None if no lane can be out of bounds. `valid` (rows, 1) is None for a shared row."""
    if i == 1 and NUM != PADDED:
        if valid is None:
            return columns < NUM
        else:
            return valid & (columns < NUM)
    elif valid is None:
        return  # not `return None`, which Triton 3.6 turns into a tensor
    else:
        return valid


@triton.jit
def _load(at, mask):
    if mask is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _within_row(channels, head_stride, DH: tl.constexpr, WIDTH: tl.constexpr):
    if WIDTH == DH:
        return channels
    else:
        return channels // DH * head_stride + channels % DH


@triton.jit
def _first_of(pairs, head_stride, DH: tl.constexpr, WIDTH: tl.constexpr):
    """Return the offset of a of each pair in the half layout; b is Dh / 2 after it."""
    if WIDTH == DH:
        return pairs
    else:
        return pairs // (DH // 2) * head_stride + pairs % (DH // 2)


@triton.jit
def _load_pairs(
    ptr,
    rows,
    valid,
    head_stride,
    i: tl.constexpr,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Load a and b (rows, pairs) fp32, 0 out of bounds; `rows` (rows, 1) are the rows' offsets."""
    if HALF:
        pairs = _pairs(i, MAIN, REST)
        mask = _mask(i, valid, pairs, WIDTH // 2, MAIN + REST)
        at = ptr + (rows + _first_of(pairs, head_stride, DH, WIDTH))
        a = _load(at, mask)
        b = _load(at + DH // 2, mask)
    else:
        channels = _channels(i, MAIN, REST)
        mask = _mask(i, valid, channels, WIDTH, 2 * (MAIN + REST))
        both = _load(ptr + (rows + _within_row(channels, head_stride, DH, WIDTH)), mask)
        a, b = tl.split(tl.reshape(both, (both.shape[0], both.shape[1] // 2, 2)))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(
    ptr,
    rows,
    valid,
    a,
    b,
    i: tl.constexpr,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Store to rows whose heads are adjacent."""
    a = a.to(ptr.dtype.element_ty)
    b = b.to(ptr.dtype.element_ty)
    if HALF:
        pairs = _pairs(i, MAIN, REST)
        mask = _mask(i, valid, pairs, WIDTH // 2, MAIN + REST)
        at = ptr + (rows + _first_of(pairs, DH, DH, WIDTH))
        tl.store(at, a, mask=mask)
        tl.store(at + DH // 2, b, mask=mask)
    else:
        channels = _channels(i, MAIN, REST)
        mask = _mask(i, valid, channels, WIDTH, 2 * (MAIN + REST))
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))
        tl.store(ptr + (rows + channels), both, mask=mask)


@triton.jit
def _load_table(
    ptr,
    position,
    valid,
    i: tl.constexpr,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    pairs = _pairs(i, MAIN, REST)
    mask = _mask(i, valid, pairs, WIDTH // 2, MAIN + REST)
    return _load(ptr + (position * (DH // 2) + pairs % (DH // 2)), mask).to(tl.float32)


@triton.jit
def _weights(
    ptr,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Load a and b of each tile, one after the other; nothing without a weight."""
    tiles = ()
    if ptr is not None:
        for i in tl.static_range(2 if REST else 1):
            a, b = _load_pairs(ptr, 0, None, DH, i, DH, WIDTH, HALF, MAIN, REST)
            tiles += (a, b)
    return tiles


@triton.jit
def _normalised(
    x_ptr,
    rows,
    valid,
    head_stride,
    eps,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return x_hat, as a and b of each tile one after the other, and rstd (rows, 1)."""
    TILES: tl.constexpr = 2 if REST else 1
    x = ()
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(TILES):
        a, b = _load_pairs(x_ptr, rows, valid, head_stride, i, DH, WIDTH, HALF, MAIN, REST)
        squares += tl.sum(a * a + b * b, axis=1)
        x += (a, b)
    rstd = (1.0 / tl.sqrt_rn(squares / WIDTH + eps))[:, None]
    x_hat = ()
    for i in tl.static_range(2 * TILES):
        x_hat += (x[i] * rstd,)
    return x_hat, rstd


@triton.jit
def _forward_rows(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    source,
    target,
    position,
    valid,
    head_stride,
    eps,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    x_hat, _ = _normalised(
        x_ptr, source, valid, head_stride, eps, DH, WIDTH, HALF, MAIN, REST, ROWS
    )
    weights = _weights(weight_ptr, DH, WIDTH, HALF, MAIN, REST)
    for i in tl.static_range(2 if REST else 1):
        a = x_hat[2 * i]
        b = x_hat[2 * i + 1]
        if weight_ptr is not None:
            a *= weights[2 * i]
            b *= weights[2 * i + 1]
        if cos_ptr is None:
            _store_pairs(y_ptr, target, valid, a, b, i, DH, WIDTH, HALF, MAIN, REST)
        else:
            cos = _load_table(cos_ptr, position, valid, i, DH, WIDTH, MAIN, REST)
            sin = _load_table(sin_ptr, position, valid, i, DH, WIDTH, MAIN, REST)
            turned_a = a * cos - b * sin
            turned_b = a * sin + b * cos
            _store_pairs(y_ptr, target, valid, turned_a, turned_b, i, DH, WIDTH, HALF, MAIN, REST)


@triton.jit
def _copy_rows(
    x_ptr,
    y_ptr,
    source,
    target,
    valid,
    head_stride,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Copy to rows whose heads are adjacent."""
    for i in tl.static_range(2 if REST else 1):
        channels = _channels(i, MAIN, REST)
        mask = _mask(i, valid, channels, WIDTH, 2 * (MAIN + REST))
        x = _load(x_ptr + (source + _within_row(channels, head_stride, DH, WIDTH)), mask)
        tl.store(y_ptr + (target + channels), x, mask=mask)


@triton.jit
def _place(row, length, GROUP: tl.constexpr):
    """Return sample, position and head of each row, (rows, 1) int64."""
    token = row // GROUP
    return (
        (token // length).to(tl.int64)[:, None],
        (token % length).to(tl.int64)[:, None],
        (row % GROUP).to(tl.int64)[:, None],
    )


@triton.jit(do_not_specialize=COUNTS[:2])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    batch_stride,
    token_stride,
    head_stride,
    q_out_batch_stride,
    k_out_batch_stride,
    num_rows,
    length,
    eps,
    GROUP: tl.constexpr,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """q, k and v share their strides; outputs have dense tokens, and v_out the strides of k_out.

    The grid is (programs, parts): the parts are those of q, k and v that are not None, in order.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (row < num_rows)[:, None]
    sample, position, head = _place(row, length, GROUP)
    source = sample * batch_stride + position * token_stride + head * head_stride
    target = position * (GROUP * WIDTH) + head * WIDTH
    part = tl.program_id(1) + (1 if q_ptr is None else 0)
    if part == 0:
        if q_ptr is not None:
            _forward_rows(
                q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr,
                source, target + sample * q_out_batch_stride, position, valid, head_stride, eps,
                DH, WIDTH, HALF, MAIN, REST, ROWS,
            )  # fmt: skip
    elif part == 1:
        if k_ptr is not None:
            _forward_rows(
                k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr,
                source, target + sample * k_out_batch_stride, position, valid, head_stride, eps,
                DH, WIDTH, HALF, MAIN, REST, ROWS,
            )  # fmt: skip
    else:
        if v_ptr is not None:
            _copy_rows(
                v_ptr, v_out_ptr, source, target + sample * k_out_batch_stride, valid, head_stride,
                DH, WIDTH, MAIN, REST,
            )  # fmt: skip


@triton.jit
def _backward_rows(
    grad_y_ptr,
    grad_y_batch_stride,
    x_ptr,
    batch_stride,
    token_stride,
    head_stride,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_x_ptr,
    grad_x_token_stride,
    partials_ptr,
    begin,
    end,
    length,
    eps,
    GROUP: tl.constexpr,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    TILES: tl.constexpr = 2 if REST else 1
    weights = _weights(weight_ptr, DH, WIDTH, HALF, MAIN, REST)
    sums = ()
    if partials_ptr is not None:
        sums += (tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, MAIN], tl.float32))
        if REST:
            sums += (tl.zeros([ROWS, REST], tl.float32), tl.zeros([ROWS, REST], tl.float32))
    for start in tl.range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = (row < end)[:, None]
        sample, position, head = _place(row, length, GROUP)
        source = sample * batch_stride + position * token_stride + head * head_stride
        x_hat, rstd = _normalised(
            x_ptr, source, valid, head_stride, eps, DH, WIDTH, HALF, MAIN, REST, ROWS
        )
        from_y = sample * grad_y_batch_stride + position * (GROUP * WIDTH) + head * WIDTH
        gs = ()
        new_sums = ()
        dot = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(TILES):
            a, b = _load_pairs(grad_y_ptr, from_y, valid, DH, i, DH, WIDTH, HALF, MAIN, REST)
            if cos_ptr is None:
                g_a = a
                g_b = b
            else:
                cos = _load_table(cos_ptr, position, valid, i, DH, WIDTH, MAIN, REST)
                sin = _load_table(sin_ptr, position, valid, i, DH, WIDTH, MAIN, REST)
                g_a = a * cos + b * sin
                g_b = b * cos - a * sin
            if partials_ptr is not None:
                new_sums += (sums[2 * i] + g_a * x_hat[2 * i],)
                new_sums += (sums[2 * i + 1] + g_b * x_hat[2 * i + 1],)
            if weight_ptr is not None:
                g_a *= weights[2 * i]
                g_b *= weights[2 * i + 1]
            dot += tl.sum(g_a * x_hat[2 * i] + g_b * x_hat[2 * i + 1], axis=1)
            gs += (g_a, g_b)
        sums = new_sums
        dot = (dot / WIDTH)[:, None]
        to_x = (sample * length + position) * grad_x_token_stride + head * WIDTH
        for i in tl.static_range(TILES):
            a = rstd * (gs[2 * i] - x_hat[2 * i] * dot)
            b = rstd * (gs[2 * i + 1] - x_hat[2 * i + 1] * dot)
            _store_pairs(grad_x_ptr, to_x, valid, a, b, i, DH, WIDTH, HALF, MAIN, REST)
    if partials_ptr is not None:
        for i in tl.static_range(TILES):
            a = tl.sum(sums[2 * i], axis=0)[None, :]
            b = tl.sum(sums[2 * i + 1], axis=0)[None, :]
            _store_pairs(partials_ptr, 0, None, a, b, i, DH, WIDTH, HALF, MAIN, REST)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_q_out_ptr,
    grad_k_out_ptr,
    grad_v_out_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    q_partials_ptr,
    k_partials_ptr,
    grad_q_out_batch_stride,
    grad_k_out_batch_stride,
    grad_v_out_batch_stride,
    batch_stride,
    token_stride,
    head_stride,
    grad_token_stride,
    num_rows,
    length,
    rows_per_program,
    eps,
    GROUP: tl.constexpr,
    DH: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The grid is that of the forward. q and k share strides; gradients have dense tokens or rows.

    partials (P, W) fp32 are sums of g * x_hat over the program's rows; None if not needed.
    """
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    of_program = tl.program_id(0).to(tl.int64) * WIDTH
    part = tl.program_id(1) + (1 if grad_q_out_ptr is None else 0)
    if part == 0:
        if grad_q_out_ptr is not None:
            _backward_rows(
                grad_q_out_ptr, grad_q_out_batch_stride,
                q_ptr, batch_stride, token_stride, head_stride,
                q_weight_ptr, cos_ptr, sin_ptr, grad_q_ptr, grad_token_stride,
                None if q_partials_ptr is None else q_partials_ptr + of_program,
                begin, end, length, eps, GROUP, DH, WIDTH, HALF, MAIN, REST, ROWS,
            )  # fmt: skip
    elif part == 1:
        if grad_k_out_ptr is not None:
            _backward_rows(
                grad_k_out_ptr, grad_k_out_batch_stride,
                k_ptr, batch_stride, token_stride, head_stride,
                k_weight_ptr, cos_ptr, sin_ptr, grad_k_ptr, grad_token_stride,
                None if k_partials_ptr is None else k_partials_ptr + of_program,
                begin, end, length, eps, GROUP, DH, WIDTH, HALF, MAIN, REST, ROWS,
            )  # fmt: skip
    else:
        if grad_v_out_ptr is not None:
            for start in tl.range(begin, end, ROWS):
                row = start + tl.arange(0, ROWS)
                valid = (row < end)[:, None]
                sample, position, head = _place(row, length, GROUP)
                source = position * (GROUP * WIDTH) + head * WIDTH
                source += sample * grad_v_out_batch_stride
                target = (sample * length + position) * grad_token_stride + head * WIDTH
                _copy_rows(
                    grad_v_out_ptr, grad_v_ptr, source, target, valid, DH, DH, WIDTH, MAIN, REST
                )


class Tiling(NamedTuple):
    """How a kernel divides its work: two tiles of pairs, rows per step, warps."""

    main: int
    rest: int
    rows: int
    num_warps: int


# A program handles enough rows for its 4 warps to move 16 bytes per access to the larger tile. When
# rows were counted by the sum of both tiles, heads of 24 and 96 channels were read 4 and 8 bytes at
# a time. In the half layout, an access covers half a row.


def forward_tiling(width: int, itemsize: int) -> Tiling:
    """Return a tiling with up to 24 values per thread."""
    main, rest, padded = _split(width)
    rows = _power_below(4096 // (itemsize * 2 * main))
    num_warps = triton.next_power_of_2(triton.cdiv(rows * padded, 32 * 24))
    return Tiling(main, rest, rows, max(num_warps, 4))


def backward_tiling(width: int, itemsize: int, half: bool) -> Tiling:
    """Return a tiling with fewer values per thread: registers also hold sums and weights."""
    main, rest, padded = _split(width)
    rows = _power_below((4096 // itemsize if half else 1024) // (2 * main))
    num_warps = max(4, _power_below(padded) // 256)
    return Tiling(main, rest, rows, min(num_warps, 16))


def _split(width: int) -> tuple[int, int, int]:
    pairs = width // 2
    main = _power_below(pairs)
    rest = 0 if main == pairs else triton.next_power_of_2(pairs - main)
    return main, rest, 2 * (main + rest)


def _power_below(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)
