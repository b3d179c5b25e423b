"""Shifted timesteps of the discriminator's ensemble (APT Eqs. 6-7).

    u ~ U[0, 1),   t = s u / (1 + (s - 1) u)

Draw and shift are one launch; 4 bytes a sample are written and nothing is read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apt import philox
from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.kernels.fused_op import FusedOp
from apt.kernels.signatures import ShiftedTimesteps
from apt.rng import Draw, key_of


def sample_shifted_timesteps(
    num: int, draw: Draw, *, shift: float, backend: str | None = None
) -> Tensor:
    """Draw one timestep per sample, shifted towards noise by Eq. 7.

    Args:
        num: samples to draw for.
        draw: the key; without a device the result is on torch's default one.
        shift: s > 0; 1 is uniform, the paper takes 12 for videos.
        backend: "triton", the kernel, or "reference", plain torch: bit for bit the same values.
            None chooses: the kernel for CUDA devices where it can run, else the reference.

    Returns:
        (num,) fp32 in [0, 1], where 0 is data and 1 is noise; they do not depend on the device.

    Raises:
        InputError: a negative num, shift not above 0 or not finite, a key beyond 64 bits, an
            unknown backend, or one that cannot run.
    """
    op = "sample_shifted_timesteps"
    if num < 0:
        raise InputError(f"{op}: num must be at least 0, got {num}")
    if not 0 < shift < math.inf:
        raise InputError(f"{op}: shift must be above 0 and finite, got {shift}")
    key = key_of(op, draw, num)
    where = torch.get_default_device() if draw.device is None else torch.device(draw.device)
    chosen = resolve_backend(op, backend, [torch.empty(0, device=where)])
    found: Tensor = timesteps_op(ShiftedTimesteps(num, shift, key, chosen, where))
    return found


def _compute(inputs: ShiftedTimesteps) -> Tensor:
    if inputs.backend == "triton":
        from apt.kernels._triton import sample_shifted_timesteps as fused

        return fused.shifted_timesteps(inputs)
    key, shift = inputs.key, inputs.shift
    u = philox.uniform(key.number, inputs.num, first=key.offset, device=inputs.device)
    # Rounded to fp32, the quotient can be the number after 1.
    return (u * shift).div_((u * (shift - 1)).add_(1)).clamp_(max=1)


def _fake(inputs: ShiftedTimesteps) -> Tensor:
    return torch.empty(inputs.num, dtype=torch.float32, device=inputs.device)


# The reference is in the op as well: a compiler that saw into it would fuse its roundings.
timesteps_op = FusedOp("apt::sample_shifted_timesteps", _compute, fake=_fake)
