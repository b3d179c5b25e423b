"""Counter-based random numbers: Philox-4x32-10 (Salmon et al. 2011), in torch.

A number depends only on a 64-bit key, the index of its sample among all ranks, and the index of its
element within the sample. There is no generator state, so values do not depend on how the work is
ordered or split, or on whether it is repeated.

The Triton kernels compute the same numbers bit for bit. Therefore this module uses only integers
and correctly rounded fp32 +, -, * and /, each rounded separately. It avoids functions whose last
bits differ between libraries (torch's fp32 square root on the CPU is MKL's, which is not correctly
rounded) and fused multiply-adds: code that a compiler could fuse must stay inside an opaque op.

Words are uint32 values, stored as int64 because torch has no arithmetic for uint32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# The negated normal quantile at p = 1/2 - q < 1/2; coefficients by rising powers.
# Centre, q <= 0.425: q A(r) / B(r), r = 0.425^2 - q^2. AS 241's PPND7 (Wichura 1988).
CENTRE = 0.425
CENTRE_SQUARED = 0.180625
CENTRE_TOP = (3.3871327179, 50.434271938, 159.29113202, 59.109374720)
CENTRE_BOTTOM = (1.0, 17.895169469, 78.757757664, 67.187563600)
# Tail, 2^-33 <= p: C(r) / D(r), r = -log p. Our minimax fit, with a relative error of at most
# 9.2e-8; published fits need the square root of r.
TAIL_TOP = (
    -1.299340349952464,
    0.982620368580284,
    1.2412574709056932,
    0.13359899683740267,
    0.0018944976512633369,
)
TAIL_BOTTOM = (
    1.0,
    1.7116875284667543,
    0.3911120205797391,
    0.015121944878007384,
    5.1674225343875206e-05,
)
# log m = f L(f), f = m - 1, m in [sqrt(1/2), sqrt(2)): our minimax fit, error at most 3.4e-8.
SQRT_HALF_BITS = 0x3F3504F3
LN_2 = 0.6931471805599453
LOG = (
    0.9999998211860657,
    -0.5000066757202148,
    0.33336180448532104,
    -0.24959345161914825,
    0.19873052835464478,
    -0.17333455383777618,
    0.16419939696788788,
    -0.10102203488349915,
)

# Pieces of this size stay in the CPU's cache.
_WORDS_PER_PIECE = 2**16


def uniform(key: int, num: int, *, first: int, device: torch.device | str | None = None) -> Tensor:
    """Draw uniform fp32 values (num,), multiples of 2^-24 in [0, 1), one per sample.

    Args:
        key: 64 bits.
        num: number of samples.
        first: global index of the first sample, in [0, 2^63 - num].
        device: of the result.
    """
    return to_uniform(_words(key, first, num, 0, 1, device)[:, 0])


def normal(
    key: int, num: int, size: int, *, first: int, device: torch.device | str | None = None
) -> Tensor:
    """Draw standard normal fp32 values (num, size): `size` elements for each of `num` samples.

    They are quantiles at the points (w + 1/2) / 2^32, with a relative error of at most 5e-7. No
    value is 0, and no magnitude exceeds 6.34.

    Args:
        key, num, first, device: as for `uniform`.
        size: elements per sample.
    """
    out = torch.empty(num, size, dtype=torch.float32, device=device)
    for rows, groups in _pieces(num, -(-size // 4)):
        words = _words(key, first + rows.start, len(rows), groups.start, len(groups), device)
        to = slice(groups.start * 4, groups.stop * 4)
        piece = out[rows.start : rows.stop, to]
        piece.copy_(to_normal(words)[:, : piece.shape[1]])
    return out


def to_uniform(words: Tensor) -> Tensor:
    """Convert words to fp32 values in [0, 1), using the upper 24 bits."""
    return (words >> 8).float() * 2**-24


def to_normal(words: Tensor) -> Tensor:
    """Convert words w to the standard normal quantile at (w + 1/2) / 2^32, in fp32."""
    signed = words.to(torch.int32)
    upper = signed < 0
    # p = (m + 1/2) / 2^32 is the point or its mirror image, below 1/2; q = 1/2 - p. Both are
    # computed from integers, so each keeps all 24 bits where it is small.
    m = signed ^ (signed >> 31)
    p = m.float().add_(0.5).mul_(2**-32)
    q = m.bitwise_xor_(0x7FFFFFFF).float().add_(0.5).mul_(2**-32)

    r = q.square().neg_().add_(CENTRE_SQUARED)
    centre_top = _polynomial(r, CENTRE_TOP).mul_(q)
    centre_bottom = _polynomial(r, CENTRE_BOTTOM)
    r = _minus_log(p)
    tail_top = _polynomial(r, TAIL_TOP)
    tail_bottom = _polynomial(r, TAIL_BOTTOM)

    centre = q <= CENTRE
    z = torch.where(centre, centre_top, tail_top)
    z /= torch.where(centre, centre_bottom, tail_bottom)
    return torch.where(upper, z, -z)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Evaluate a polynomial by Horner's rule, rounding twice per step."""
    total = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(coefficients[0])


def _minus_log(p: Tensor) -> Tensor:
    """Return -log p of normal fp32 values in (0, 1/2), from their exponent and mantissa."""
    bits = p.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32).sub_(1)
    log = _polynomial(f, LOG).mul_(f)
    return exponent.float().mul_(LN_2).add_(log).neg_()


def _words(
    key: int,
    first: int,
    num: int,
    first_group: int,
    num_groups: int,
    device: torch.device | str | None,
) -> Tensor:
    """Return words (num, 4 num_groups): a sample's element e is word e mod 4 of counter e div 4."""
    sample = first + torch.arange(num, device=device)[:, None]
    group = first_group + torch.arange(num_groups, device=device)
    counter = (group & _MASK, group >> 32, sample & _MASK, sample >> 32)
    return torch.stack(philox(counter, key), dim=-1).flatten(1)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, ...]:
    """Return four words per counter of four words (shapes broadcast) under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(ROUNDS):
        # The low 32 bits of a product are right even if its 64 bits overflow. c1 and c3 keep bits
        # above the word: only the factors must be words.
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (high >> 32 ^ c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (low >> 32 ^ c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = high, low
        k0, k1 = k0 + KEY_STEPS[0] & _MASK, k1 + KEY_STEPS[1] & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _pieces(num: int, groups: int) -> Iterator[tuple[range, range]]:
    """Yield ranges of samples, and of groups of four elements, that cover (num, groups)."""
    width = max(min(groups, _WORDS_PER_PIECE // 4), 1)
    height = max(_WORDS_PER_PIECE // 4 // width, 1)
    for row in range(0, num, height):
        for group in range(0, groups, width):
            yield range(row, min(row + height, num)), range(group, min(group + width, groups))
