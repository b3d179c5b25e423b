"""The cases that are compiled. To add a kernel, add a `Case` here.

A case calls an op's launcher on small CPU tensors. Sizes that change from call to call do not
affect the code; those that do (widths, dtypes, strides) are taken from models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.kernels import StreamQKV
from apt.kernels._triton.fused_rmsprop import fused_rmsprop_op
from apt.kernels._triton.joint_qk_norm_rope import joint_qk_norm_rope
from apt.kernels._triton.modulated_norm import modulated_norm
from apt.kernels._triton.norm_rope import norm_rope
from apt.kernels._triton.perturbed_batch import perturbed_batch
from apt.kernels._triton.query_pooling import pool
from apt.kernels._triton.residual_modulated_norm import residual_modulated_norm
from apt.kernels._triton.sample_shifted_timesteps import shifted_timesteps
from apt.kernels._triton.segment_sum import segment_sum
from apt.kernels.signatures import (
    ModulatedNorm,
    NormRope,
    PerturbedBatch,
    Pooling,
    ResidualModulatedNorm,
    RMSpropOptions,
    RMSpropStep,
    RopeOptions,
    ShiftedTimesteps,
)
from apt.rng import PhiloxKey

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

# Among them the digits, DiT-XL, Wan 1.3B, SD 3.5, apt_8b, Wan 14B, an odd width and the widest
WIDTHS = (64, 192, 1152, 1536, 2432, 3000, 3072, 5120, 8192)

# Channels of a head: mmdit_tiny, SD 3.5, an odd size, apt_8b and Wan, the widest. Then channels of
# all heads of 128 together, which Wan 1.3B and 14B norm as one
HEADS = (24, 64, 96, 128, 256)
ACROSS_HEADS = (1536, 5120)

# Kernels that many ops launch, compiled by their own cases
SHARED = ("segment_sum.segment_sum",)

# Kernels without 16-byte accesses, and why they cannot have them
NARROW_LOADS: dict[str, str] = {}
NARROW_STORES = {
    "segment_sum.segment_sum": "128 threads store a row of 64 sums",
    "sample_shifted_timesteps.timesteps": "one number for each thread",
}

# (kernel, channels, dtype, chip): accepted bytes of local memory, and why
ACCEPTED_SPILLS = {
    ("norm_kernels.backward", 8192, "float32", "sm_100"): (
        24,
        "a row of 8192 in fp32 takes 32 warps, which leaves 64 registers per thread; these are "
        "enough for sm_90's assembler but not for sm_100's, even if fewer values are kept",
    )
}

# The same, for single versions of Triton.
ACCEPTED_SPILLS_OF = {
    "3.6.0": {
        ("norm_kernels.backward", 5120, "bfloat16", "sm_90"): (
            16,
            "a layer norm with weight and bias; later assemblers find registers for these two "
            "values, and another tiling would be slower with every version",
        )
    }
}


def accepted_spill(version: str, kernel: str, width: int, dtype: str, chip: str) -> int:
    """Return the bytes that a kernel may spill when this version of Triton compiles it."""
    spills = {**ACCEPTED_SPILLS, **ACCEPTED_SPILLS_OF.get(version, {})}
    return spills.get((kernel, width, dtype, chip), (0, ""))[0]


@dataclass(frozen=True)
class Point:
    """One shape class: channels (or values of a sample) and dtype of the activations."""

    width: int
    dtype: torch.dtype

    def empty(self, *size: int) -> Tensor:
        """Return an uninitialised leaf that requires a gradient."""
        return torch.empty(size, dtype=self.dtype).requires_grad_()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to call an op.

    Attributes:
        name: the op, and what is special about the call.
        call: calls the op at a point, backward included.
        points: the shape classes; `points(widths, dtypes)` makes them.
        quick: the point that the default tests compile; None if they do not.
        unfused: results are promised bit for bit, so the code must contain no fused multiply-add
            and no approximate instruction.
        shared: compiles only kernels of `SHARED`.
    """

    name: str
    call: Callable[[Point], None]
    points: tuple[Point, ...]
    quick: Point | None = None
    unfused: bool = False
    shared: bool = False


def points(widths: Sequence[int], *dtypes: torch.dtype) -> tuple[Point, ...]:
    """Return every width in every dtype."""
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
    norm = ModulatedNorm(x, scale, shift, weight, bias, index, 1e-6, layer)
    outputs: tuple[Tensor, ...]
    if residual:
        inputs = ResidualModulatedNorm(norm, point.empty(*tokens), gate)
        outputs = residual_modulated_norm(inputs)
    else:
        outputs = (modulated_norm(norm),)
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def _segment_sum(point: Point, *, rows: bool) -> None:
    index = torch.zeros(_BATCH, dtype=torch.int64) if rows else None
    segment_sum(torch.empty(3, 4 * _BATCH, point.width, dtype=point.dtype), index, _BATCH)


_KEY = PhiloxKey(seed=0, step=0, offset=0, stream="noise")


def _timesteps(point: Point) -> None:
    inputs = ShiftedTimesteps(point.width, 12.0, _KEY, "triton", torch.device("cpu"))
    shifted_timesteps(inputs)


def _perturbed_batch(point: Point) -> None:
    x = torch.empty(_BATCH, point.width, dtype=point.dtype)
    perturbed_batch(PerturbedBatch(x, x, 0.1, _BATCH, _KEY, "triton"))


def _streams(
    point: Point, *, across_heads: bool = False, half: bool = False, text_queries: bool = True
) -> None:
    """q, k and v of visual tokens, which are rotated, and of text tokens, which are not."""
    heads = (point.width // 128, 128) if across_heads else (2, point.width)
    visual = point.empty(_BATCH, _LENGTH, 3, *heads)
    text = point.empty(_BATCH, _LENGTH, 3 if text_queries else 2, *heads)
    weights = [point.empty(point.width) for _ in range(4)]
    cos, sin = torch.empty(2, _LENGTH, heads[1] // 2).unbind()
    streams = [
        StreamQKV(visual, weights[0], weights[1], cos, sin),
        StreamQKV(text, weights[2] if text_queries else None, weights[3]),
    ]
    outputs = joint_qk_norm_rope(streams, RopeOptions(1e-6, across_heads, half))
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def _q_and_k(
    point: Point, *, across_heads: bool = False, half: bool = False, rope: bool = True,
    affine: bool = True,
) -> None:  # fmt: skip
    """q and k of separate projections, as in Wan."""
    heads = (point.width // 128, 128) if across_heads else (2, point.width)
    q, k = (point.empty(_BATCH, _LENGTH, *heads) for _ in range(2))
    q_weight, k_weight = (point.empty(point.width) if affine else None for _ in range(2))
    cos, sin = torch.empty(2, _LENGTH, heads[1] // 2).unbind() if rope else (None, None)
    options = RopeOptions(1e-6, across_heads, half)
    outputs = norm_rope(NormRope(q, k, q_weight, k_weight, cos, sin, options))
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def _queries(
    point: Point, *, across_heads: bool = False, half: bool = False, rope: bool = True
) -> None:
    """Queries only, as in cross-attention, whose keys have another length."""
    heads = (point.width // 128, 128) if across_heads else (2, point.width)
    x, weight = point.empty(_BATCH, _LENGTH, *heads), point.empty(point.width)
    cos, sin = torch.empty(2, _LENGTH, heads[1] // 2).unbind() if rope else (None, None)
    options = RopeOptions(1e-6, across_heads, half)
    (output,) = norm_rope(NormRope(x, None, weight, None, cos, sin, options))
    output.backward(torch.empty_like(output))


def _pooling(point: Point) -> None:
    """Tokens of a discriminator's head; the folded queries are fp32 with any dtype of tokens."""
    x = point.empty(_BATCH, _LENGTH, point.width)
    folded = torch.empty(point.width // 64, point.width).requires_grad_()
    pooled = pool(Pooling(x, folded, 1e-6))
    pooled.backward(torch.empty_like(pooled))


def _rmsprop(point: Point, *, ema: bool) -> None:
    param, grad = (torch.empty(point.width, dtype=point.dtype) for _ in range(2))
    square_avg, average = torch.empty(2, point.width)
    averages = [average] if ema else []
    options = RMSpropOptions(lr=1e-3, alpha=0.9, eps=1e-8, weight_decay=0.0)
    fused_rmsprop_op(RMSpropStep([param], [grad], [square_avg], averages, options, 0.995))


# The variants that need the most registers are compiled at every width, the others at the widths of
# models that use them.
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
    Case(
        name="joint_qk_norm_rope",
        call=_streams,
        points=points(HEADS, BF16) + points((128,), FP32, FP16),
        quick=Point(128, BF16),
    ),
    Case(
        name="joint_qk_norm_rope, half layout",
        call=lambda p: _streams(p, half=True),
        points=points(HEADS, BF16),
    ),
    Case(
        name="joint_qk_norm_rope, text without queries",
        call=lambda p: _streams(p, text_queries=False),
        points=points((128,), BF16),
    ),
    Case(
        name="qk_norm_rope across heads",
        call=lambda p: _q_and_k(p, across_heads=True),
        points=points(ACROSS_HEADS, BF16, FP32),
    ),
    Case(
        name="qk_norm_rope across heads, half layout",
        call=lambda p: _q_and_k(p, across_heads=True, half=True),
        points=points(ACROSS_HEADS, BF16),
    ),
    Case(
        name="qk_norm_rope across heads, not rotated",
        call=lambda p: _q_and_k(p, across_heads=True, rope=False),
        points=points(ACROSS_HEADS, BF16),
    ),
    Case(
        name="qk_norm_rope, no weights",
        call=lambda p: _q_and_k(p, affine=False),
        points=points((128,), BF16),
    ),
    Case(
        name="qk_norm_rope per head, not rotated",
        call=lambda p: _q_and_k(p, rope=False),
        points=points((64,), BF16),
    ),
    Case(
        name="norm_rope per head",
        call=_queries,
        points=points(HEADS, BF16) + points((128,), FP32, FP16),
    ),
    Case(
        name="norm_rope per head, half layout",
        call=lambda p: _queries(p, half=True),
        points=points((128,), BF16),
    ),
    Case(
        name="norm_rope per head, not rotated",
        call=lambda p: _queries(p, rope=False),
        points=points((64, 128), BF16),
    ),
    Case(
        name="norm_rope across heads, not rotated",
        call=lambda p: _queries(p, across_heads=True, rope=False),
        points=points(ACROSS_HEADS, BF16),
    ),
    # The digits, DiT-XL, apt_8b and Wan 14B: 4, 18, 48 and 80 heads, each with another tiling
    Case(
        name="query_pooling",
        call=_pooling,
        points=points((256, 1152, 3072, 5120), BF16) + points((256, 3072), FP32),
        quick=Point(3072, BF16),
    ),
    # The width is the size of one parameter, which does not affect the code
    Case(
        name="FusedRMSprop with EMA",
        call=lambda p: _rmsprop(p, ema=True),
        points=points((4096,), FP32, BF16),
    ),
    Case(
        name="FusedRMSprop",
        call=lambda p: _rmsprop(p, ema=False),
        points=points((4096,), FP32, BF16),
    ),
)
