"""What is compiled. Adding a kernel is one `Case` here.

A case calls an op's launcher on small CPU tensors: sizes that change from call to call do not reach
the code, and those that do (widths, types, strides) are the ones of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.kernels._triton import norms, sampling
from apt.kernels._triton.segment_sum import segment_sum

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

# The digits, DiT-XL, Wan 1.3B, SD 3.5, an odd one, apt_8b, Wan 14B, the widest
WIDTHS = (64, 192, 1152, 1536, 2432, 3000, 3072, 5120, 8192)

# Launched by many ops, compiled by a case of their own
SHARED = ("segment_sum.segment_sum",)

# Kernels that have no 16-byte access, and why they cannot
NARROW_LOADS: dict[str, str] = {}
NARROW_STORES = {
    "segment_sum.segment_sum": "128 threads store a row of 64 sums",
    "sampling.timesteps": "one number for each thread",
}

# (kernel, channels, dtype, chip): bytes of local memory that are accepted, and why
ACCEPTED_SPILLS = {
    ("norms.backward", 8192, "float32", "sm_100"): (
        24,
        "a row of 8192 in fp32 takes 32 warps, which leaves 64 registers a thread; the assembler "
        "for sm_90 gets along with them, that for sm_100 does not, with fewer values kept either",
    )
}


@dataclass(frozen=True)
class Point:
    """One shape class: channels (or numbers of a sample) and dtype of the activations."""

    width: int
    dtype: torch.dtype

    def empty(self, *size: int) -> Tensor:
        """A leaf that wants a gradient."""
        return torch.empty(size, dtype=self.dtype).requires_grad_()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way in which an op is called.

    Attributes:
        name: the op, and what is special.
        call: calls it, backward included, at a point.
        points: the shape classes; `points(widths, dtypes)` makes them.
        quick: the point at which the default tests compile it.
        unfused: its results are promised bit for bit, so that the code must hold no fused multiply
            and add, and nothing approximate.
        shared: compiles kernels of `SHARED`, and no others.
    """

    name: str
    call: Callable[[Point], None]
    points: tuple[Point, ...]
    quick: Point | None = None
    unfused: bool = False
    shared: bool = False


def points(widths: Sequence[int], *dtypes: torch.dtype) -> tuple[Point, ...]:
    """Every width in every dtype."""
    return tuple(Point(width, dtype) for width in widths for dtype in dtypes)


_BATCH, _LENGTH = 2, 32


def _norm(
    point: Point, *, residual: bool = False, affine: bool = False, rows: bool = False,
    per_token: bool = False, layer: bool = False,
) -> None:  # fmt: skip
    tokens = (_BATCH, _LENGTH, point.width)
    if per_token:
        gate, scale, shift = (point.empty(*tokens) for _ in range(3))
    else:  # cut from one table, as blocks do
        gate, scale, shift, *_ = point.empty(_BATCH, 6 * point.width).chunk(6, dim=1)
    x = point.empty(*tokens)
    weight = point.empty(point.width) if affine else None
    bias = point.empty(point.width) if affine and layer else None
    index = torch.zeros(_BATCH, dtype=torch.int64) if rows else None
    outputs: tuple[Tensor, ...]
    if residual:
        update = point.empty(*tokens)
        outputs = norms.residual_modulated_norm(
            x, update, gate, scale, shift, weight, bias, layer, 1e-6, index
        )
    else:
        outputs = (norms.modulated_norm(x, scale, shift, weight, bias, layer, 1e-6, index),)
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def _segment_sum(point: Point, *, rows: bool) -> None:
    index = torch.zeros(_BATCH, dtype=torch.int64) if rows else None
    segment_sum(torch.empty(3, 4 * _BATCH, point.width, dtype=point.dtype), index, _BATCH)


_KEY = {"key": 2**40 + 1, "first": 0}


def _timesteps(point: Point) -> None:
    sampling.shifted_timesteps(num=point.width, shift=12.0, device=torch.device("cpu"), **_KEY)


def _perturbed_batch(point: Point) -> None:
    x = torch.empty(_BATCH, point.width, dtype=point.dtype)
    sampling.perturbed_batch(x, x, 0.1, _BATCH, **_KEY)


# The variants that hold most in registers are compiled at every width, the lighter ones at the
# widths of models that use them.
CASES = (
    Case(
        name="segment_sum",
        call=lambda p: _segment_sum(p, rows=False),
        points=points(WIDTHS, FP32),
        shared=True,
    ),
    Case(
        name="segment_sum, shared rows",
        call=lambda p: _segment_sum(p, rows=True),
        points=points(WIDTHS, FP32),
        shared=True,
    ),
    Case(
        name="residual_modulated_norm, layer with weight and bias, shared rows",
        call=lambda p: _norm(p, residual=True, layer=True, affine=True, rows=True),
        points=points(WIDTHS, BF16) + points((192, 3072, 8192), FP32) + points((3072,), FP16),
        quick=Point(3072, BF16),
    ),
    Case(
        name="residual_modulated_norm, layer with weight and bias, per token",
        call=lambda p: _norm(p, residual=True, layer=True, affine=True, per_token=True),
        points=points(WIDTHS, BF16),
    ),
    Case(
        name="residual_modulated_norm, rms",
        call=lambda p: _norm(p, residual=True),
        points=points((192, 3072), BF16, FP32),
        quick=Point(3072, BF16),
    ),
    Case(
        name="modulated_norm, rms",
        call=_norm,
        points=points((192, 3072), BF16, FP32),
    ),
    Case(
        name="modulated_norm, layer",
        call=lambda p: _norm(p, layer=True),
        points=points((1152, 1536, 2432, 5120), BF16),
    ),
    Case(
        name="sample_shifted_timesteps",
        call=_timesteps,
        points=points((1024,), FP32),
        quick=Point(1024, FP32),
        unfused=True,
    ),
    # Latents of the digits, and of apt_8b at 1024 px
    Case(
        name="perturbed_batch",
        call=_perturbed_batch,
        points=points((9216, 2**18), BF16, FP32) + points((2**18,), FP16),
        quick=Point(2**18, BF16),
        unfused=True,
    ),
)
