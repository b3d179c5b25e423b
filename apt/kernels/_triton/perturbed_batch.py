"""`perturbed_batch` in Triton.

The compiler must not fuse multiplications and additions (enable_fp_fusion=False): every step then
rounds as in the torch reference, and values are the same bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt.kernels._triton.philox import to_normal, words4
from apt.kernels.signatures import PerturbedBatch

GROUPS = 256  # of four elements per program of PERTURB_WARPS: 8 values per thread
PERTURB_WARPS = 4


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


def perturbed_batch(inputs: PerturbedBatch) -> Tensor:
    """Return (B + P + F, ...) in the dtype of x_real."""
    x_real, x_fake, num_perturbed = inputs.x_real, inputs.x_fake, inputs.num_perturbed
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
            inputs.key.number,
            inputs.key.offset,
            inputs.sigma,
            num_real,
            num_perturbed,
            size,
            tiles,
            GROUPS=GROUPS,
            num_warps=PERTURB_WARPS,
            enable_fp_fusion=False,
        )
    return out
