"""`sample_shifted_timesteps` and `perturbed_batch` in Triton.

Neither is fused by the compiler's floating-point rules (enable_fp_fusion=False): every step rounds
as in the torch reference, and the values are the same bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt.kernels._triton.philox import to_normal, to_uniform, words4

TIMESTEPS = 128  # per program
GROUPS = 256  # of four elements per program of PERTURB_WARPS: 8 values per thread
PERTURB_WARPS = 4


@triton.jit(do_not_specialize=("key", "first", "num"))
def timesteps_kernel(out_ptr, key, first, num, shift, shift_minus_1, SAMPLES: tl.constexpr):
    index = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    sample = first + index.to(tl.int64)
    words, _, _, _ = words4(key, sample, sample * 0)
    u = to_uniform(words)
    t = tl.div_rn(u * shift, u * shift_minus_1 + 1.0)
    tl.store(out_ptr + index, tl.minimum(t, 1.0), mask=index < num)


def shifted_timesteps(
    key: int, num: int, *, first: int, shift: float, device: torch.device
) -> Tensor:
    """(num,) fp32; see `apt.kernels.timesteps`."""
    out = torch.empty(num, dtype=torch.float32, device=device)
    if num:
        with torch.cuda.device_of(out):
            timesteps_kernel[(triton.cdiv(num, TIMESTEPS),)](
                out,
                key,
                first,
                num,
                shift,
                shift - 1,
                SAMPLES=TIMESTEPS,
                num_warps=TIMESTEPS // 32,
                enable_fp_fusion=False,
            )
    return out


@triton.jit(do_not_specialize=("key", "first", "num_real", "num_perturbed", "tiles"))
def perturb_kernel(
    real_ptr,
    fake_ptr,
    out_ptr,
    key,
    first,
    sigma,
    num_real,
    num_perturbed,
    size,
    tiles,
    GROUPS: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    element = tile * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
    mask = element < size
    if row >= num_real:
        x = tl.load(fake_ptr + (row - num_real) * size + element, mask=mask)
        tl.store(out_ptr + (row + num_perturbed) * size + element, x, mask=mask)
    else:
        x = tl.load(real_ptr + row * size + element, mask=mask)
        tl.store(out_ptr + row * size + element, x, mask=mask)
        if row < num_perturbed:
            w0, w1, w2, w3 = words4(key, first + row, tile * GROUPS + tl.arange(0, GROUPS))
            words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            y = to_normal(words) * sigma + x.to(tl.float32)
            tl.store(out_ptr + (row + num_real) * size + element, y, mask=mask)


def perturbed_batch(
    x_real: Tensor, x_fake: Tensor, sigma: float, num_perturbed: int, *, key: int, first: int
) -> Tensor:
    """(B + P + F, ...) in the dtype of x_real; see `apt.kernels.perturbed_batch`."""
    num_real, num_fake = x_real.shape[0], x_fake.shape[0]
    out = x_real.new_empty(num_real + num_perturbed + num_fake, *x_real.shape[1:])
    if out.numel() == 0:
        return out
    size = out[0].numel()
    tiles = triton.cdiv(size, 4 * GROUPS)
    with torch.cuda.device_of(out):
        perturb_kernel[((num_real + num_fake) * tiles,)](
            x_real.contiguous(),
            x_fake.contiguous(),
            out,
            key,
            first,
            sigma,
            num_real,
            num_perturbed,
            size,
            tiles,
            GROUPS=GROUPS,
            num_warps=PERTURB_WARPS,
            enable_fp_fusion=False,
        )
    return out
