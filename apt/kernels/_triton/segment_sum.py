"""The second stage of a reduction over tokens: adds partial sums of programs in a fixed order.

Atomics would add them in the order in which programs end, so gradients would differ between runs.

Shapes: K quantities, P programs, D channels, R condition rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PARTIALS_PER_STEP = 32
COLUMNS = 64  # per program: 3072 channels and 3 quantities are 144 programs, one per processor


@triton.jit(do_not_specialize=("num_programs", "num_rows", "programs_per_sample"))
def segment_sum_kernel(
    partials_ptr,
    rows_ptr,
    sums_ptr,
    num_programs,
    num_rows,
    programs_per_sample,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTIALS_PER_STEP: tl.constexpr,
):
    quantity = (tl.program_id(0) // num_rows).to(tl.int64)
    row = tl.program_id(0) % num_rows
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if rows_ptr is None:
        first = row * programs_per_sample
        last = first + programs_per_sample
    else:
        first = 0
        last = num_programs
    total = tl.zeros([PARTIALS_PER_STEP, COLUMNS], tl.float32)
    for start in range(first, last, PARTIALS_PER_STEP):
        program = start + tl.arange(0, PARTIALS_PER_STEP)
        mine = program < last
        if rows_ptr is not None:
            of = tl.load(rows_ptr + program // programs_per_sample, mask=mine, other=-1)
            mine = mine & (of == row)
        offsets = (quantity * num_programs + program)[:, None] * D + columns
        mask = mine[:, None] & (columns < D)
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    at = (quantity * num_rows + row) * D + columns
    tl.store(sums_ptr + at, tl.sum(total, axis=0)[None, :], mask=columns < D)


def segment_sum(partials: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """Add the partial sums that belong to each condition row.

    Args:
        partials: (K, P, D) fp32; programs of one sample are adjacent, and all samples have equally
            many.
        rows: (B,) int64, the row of each sample, B a divisor of P; None: sample b has row b.
        num_rows: R.

    Returns:
        (K, R, D) fp32; zeros for rows that no sample uses.
    """
    quantities, programs, width = partials.shape
    sums = partials.new_empty(quantities, num_rows, width)
    samples = num_rows if rows is None else rows.shape[0]
    grid = (quantities * num_rows, triton.cdiv(width, COLUMNS))
    segment_sum_kernel[grid](
        partials,
        rows,
        sums,
        programs,
        num_rows,
        programs // samples,
        D=width,
        COLUMNS=COLUMNS,
        PARTIALS_PER_STEP=PARTIALS_PER_STEP,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return sums
