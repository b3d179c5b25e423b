"""`FusedRMSprop` in Triton: all tensors of a kind in one launch.

    v   = alpha v + (1 - alpha) g^2            g = dL/dp + weight_decay p
    p   = p - lr g / (sqrt(v) + eps)
    avg = avg + (1 - ema_decay) (p - avg)

A model has about a thousand tensors, most of them small. One launch for each would take a thousand
launches for a few bytes each. Copying them into one buffer would move as many bytes as the step
itself. So the kernel gets a table of addresses, and each program updates a chunk of one tensor. The
addresses of gradients change from step to step, so the table (48 bytes per tensor) is written for
each step. The assignment of chunks depends only on sizes and is cached.

Shapes: N tensors of one kind, C chunks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt.kernels.fused_op import LibraryOp
from apt.kernels.signatures import RMSpropStep

CHUNK = 2**15
BLOCK = 1024
TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update(
    param_ptr,
    grad_ptr,
    square_avg_ptr,
    average_ptr,
    offsets,
    mask,
    lr,
    alpha,
    one_minus_alpha,
    eps,
    weight_decay,
    ema_weight,
    EMA: tl.constexpr,
):
    param = tl.load(param_ptr + offsets, mask=mask).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
    square_avg = tl.load(square_avg_ptr + offsets, mask=mask)
    grad += weight_decay * param
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad
    tl.store(square_avg_ptr + offsets, square_avg, mask=mask)
    param -= lr * grad / (tl.sqrt_rn(square_avg) + eps)
    rounded = param.to(param_ptr.dtype.element_ty)
    tl.store(param_ptr + offsets, rounded, mask=mask)
    if EMA:
        average = tl.load(average_ptr + offsets, mask=mask)
        average += ema_weight * (rounded.to(tl.float32) - average)
        tl.store(average_ptr + offsets, average, mask=mask)


@triton.jit
def rmsprop_kernel(
    table_ptr,
    tensors_ptr,
    lr,
    alpha,
    one_minus_alpha,
    eps,
    weight_decay,
    ema_weight,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EMA: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """table (N, 6) int64: addresses of p, g, v and avg, size, first chunk. tensors (C,) int32."""
    row = table_ptr + 6 * tl.load(tensors_ptr + tl.program_id(0)).to(tl.int64)
    param_ptr = _pointer(tl.load(row), PARAM, ALIGNED)
    grad_ptr = _pointer(tl.load(row + 1), GRAD, ALIGNED)
    square_avg_ptr = _pointer(tl.load(row + 2), tl.float32, ALIGNED)
    average_ptr = _pointer(tl.load(row + 3), tl.float32, ALIGNED)
    begin = (tl.program_id(0) - tl.load(row + 5)) * CHUNK
    size = tl.minimum(tl.load(row + 4) - begin, CHUNK).to(tl.int32)
    whole = size // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):  # no predicates here; only the tail below needs masks
        offsets = begin + start + tl.arange(0, BLOCK)
        _update(
            param_ptr, grad_ptr, square_avg_ptr, average_ptr, offsets, None,
            lr, alpha, one_minus_alpha, eps, weight_decay, ema_weight, EMA,
        )  # fmt: skip
    if whole < size:
        lanes = whole + tl.arange(0, BLOCK)
        _update(
            param_ptr, grad_ptr, square_avg_ptr, average_ptr, begin + lanes, lanes < size,
            lr, alpha, one_minus_alpha, eps, weight_decay, ema_weight, EMA,
        )  # fmt: skip


class Kind(NamedTuple):
    """Properties of tensors that a launch is compiled for."""

    param: torch.dtype
    grad: torch.dtype
    aligned: bool


def kinds(*columns: list[Tensor]) -> dict[Kind, list[int]]:
    """Group the indices of tensors that share a launch; columns are p, g and all other tensors."""
    found: dict[Kind, list[int]] = {}
    for index, row in enumerate(zip(*columns, strict=True)):
        if row[0].numel():
            # Shards of one buffer may start at any address
            aligned = all(tensor.data_ptr() % 16 == 0 for tensor in row)
            found.setdefault(Kind(row[0].dtype, row[1].dtype, aligned), []).append(index)
    return found


def _step(inputs: RMSpropStep) -> None:
    params, averages, options = inputs.params, inputs.averages, inputs.options
    grads = [grad.contiguous() for grad in inputs.grads]
    columns = [params, grads, inputs.square_avgs, *([averages] if averages else [])]
    for kind, indices in kinds(*columns).items():
        sizes = tuple(params[i].numel() for i in indices)
        device = params[indices[0]].device
        first, tensors = _chunks(sizes, device)
        rows = [
            [column[i].data_ptr() for column in columns] + [0] * (4 - len(columns)) + [size, chunk]
            for i, size, chunk in zip(indices, sizes, first, strict=True)
        ]
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        with torch.cuda.device_of(params[indices[0]]):
            rmsprop_kernel[(tensors.shape[0],)](
                table.to(device, non_blocking=True),
                tensors,
                options.lr,
                options.alpha,
                1.0 - options.alpha,
                options.eps,
                options.weight_decay,
                1.0 - inputs.ema_decay,
                PARAM=TRITON_TYPES[kind.param],
                GRAD=TRITON_TYPES[kind.grad],
                EMA=bool(averages),
                ALIGNED=kind.aligned,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )


@lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[list[int], Tensor]:
    """Return the first chunk of each tensor, and the tensor of each chunk, (C,) int32."""
    counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    tensors = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(counts)
    return (counts.cumsum(0) - counts).tolist(), tensors.to(device)


fused_rmsprop_op = LibraryOp(
    "apt::fused_rmsprop",
    _step,
    fake=lambda inputs: None,
    mutates_args=("params", "square_avgs", "averages"),
)
