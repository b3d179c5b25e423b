"""Kernels that the gate must refuse, compiled for sm_90: prints the problems of each in a line."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.aot.build import build
from benchmarks.aot.cases import Case, Point
from benchmarks.aot.chips import CHIPS
from benchmarks.aot.gate import problems


@triton.jit
def spilling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x, axis=0))


@triton.jit
def narrow_kernel(x_ptr, y_ptr, stride, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at * stride))


@triton.jit
def approximate_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / (x * x + 1.5))


@triton.jit
def atomic_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at))
    tl.atomic_add(y_ptr + at, 1.0)


def launch(kernel: triton.JITFunction, *args: int, **options: int) -> None:
    x = torch.empty(16_384)
    kernel[(1,)](x, x, *args, **options)


CALLS = {
    "spilling": lambda _: launch(spilling_kernel, SIZE=16_384, num_warps=1),
    "narrow": lambda _: launch(narrow_kernel, 3, SIZE=1024, num_warps=4),
    "approximate": lambda _: launch(approximate_kernel, SIZE=1024, num_warps=4),
    "atomic": lambda _: launch(atomic_kernel, SIZE=1024, num_warps=4),
}

for name, call in CALLS.items():
    point = Point(1024, torch.float32)
    case = Case(name=name, call=call, points=(point,), unfused=name == "approximate")
    (row,) = build(case, point, next(chip for chip in CHIPS if chip.capability == 90))
    print("; ".join(problems(row, unfused=case.unfused)))
