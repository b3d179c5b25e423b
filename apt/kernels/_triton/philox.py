"""`apt.philox` in Triton, bit for bit, for kernels launched with enable_fp_fusion=False."""

from __future__ import annotations

import triton
import triton.language as tl

from apt import philox

CENTRE = tl.constexpr(philox.CENTRE)
CENTRE_SQUARED = tl.constexpr(philox.CENTRE_SQUARED)
CENTRE_TOP = tl.constexpr(philox.CENTRE_TOP)
CENTRE_BOTTOM = tl.constexpr(philox.CENTRE_BOTTOM)
TAIL_TOP = tl.constexpr(philox.TAIL_TOP)
TAIL_BOTTOM = tl.constexpr(philox.TAIL_BOTTOM)
SQRT_HALF_BITS = tl.constexpr(philox.SQRT_HALF_BITS)
LN_2 = tl.constexpr(philox.LN_2)
LOG = tl.constexpr(philox.LOG)
ROUNDS = tl.constexpr(philox.ROUNDS)
UNIFORM_STEP = tl.constexpr(2**-24)
WORD_STEP = tl.constexpr(2**-32)


@triton.jit
def words4(key, sample, group):
    """Draw four words for each group of four elements; int64 `sample` and `group` broadcast."""
    zeros = (sample + group) * 0
    sample += zeros
    group += zeros
    return tl.philox(
        key,
        group.to(tl.uint32),
        (group >> 32).to(tl.uint32),
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
        ROUNDS,
    )


@triton.jit
def to_uniform(words):
    return (words >> 8).to(tl.float32) * UNIFORM_STEP


@triton.jit
def to_normal(words):
    signed = words.to(tl.int32, bitcast=True)
    m = signed ^ (signed >> 31)
    p = (m.to(tl.float32) + 0.5) * WORD_STEP
    q = ((m ^ 0x7FFFFFFF).to(tl.float32) + 0.5) * WORD_STEP

    r = CENTRE_SQUARED - q * q
    centre_top = _polynomial(r, CENTRE_TOP, 3) * q
    centre_bottom = _polynomial(r, CENTRE_BOTTOM, 3)
    r = _minus_log(p)
    tail_top = _polynomial(r, TAIL_TOP, 4)
    tail_bottom = _polynomial(r, TAIL_BOTTOM, 4)

    centre = q <= CENTRE
    top = tl.where(centre, centre_top, tail_top)
    z = tl.div_rn(top, tl.where(centre, centre_bottom, tail_bottom))
    return tl.where(signed < 0, z, -z)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    total = x * COEFFICIENTS[DEGREE]
    for i in tl.static_range(1, DEGREE):
        total = (total + COEFFICIENTS[DEGREE - i]) * x
    return total + COEFFICIENTS[0]


@triton.jit
def _minus_log(p):
    bits = p.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return -(exponent.to(tl.float32) * LN_2 + _polynomial(f, LOG, 7) * f)
