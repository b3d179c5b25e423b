"""`sample_shifted_timesteps` in Triton.

The compiler must not fuse multiplications and additions (enable_fp_fusion=False): every step then
rounds as in the torch reference, and values are the same bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt.kernels._triton.philox import to_uniform, words4
from apt.kernels.signatures import ShiftedTimesteps

TIMESTEPS = 128  # per program


@triton.jit(do_not_specialize=("key", "first", "num"))
def timesteps_kernel(out_ptr, key, first, num, shift, shift_minus_1, SAMPLES: tl.constexpr):
    index = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    sample = first + index.to(tl.int64)
    words, _, _, _ = words4(key, sample, sample * 0)
    u = to_uniform(words)
    t = tl.div_rn(u * shift, u * shift_minus_1 + 1.0)
    tl.store(out_ptr + index, tl.minimum(t, 1.0), mask=index < num)


def shifted_timesteps(inputs: ShiftedTimesteps) -> Tensor:
    """Return (num,) fp32."""
    num, shift = inputs.num, inputs.shift
    out = torch.empty(num, dtype=torch.float32, device=inputs.device)
    if num:
        with torch.cuda.device_of(out):
            timesteps_kernel[(triton.cdiv(num, TIMESTEPS),)](
                out,
                inputs.key.number,
                inputs.key.offset,
                num,
                shift,
                shift - 1,
                SAMPLES=TIMESTEPS,
                num_warps=TIMESTEPS // 32,
                enable_fp_fusion=False,
            )
    return out
