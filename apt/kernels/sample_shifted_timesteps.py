"""Shifted timesteps of the discriminator's ensemble (APT Eqs. 6-7).

    u ~ U[0, 1),   t = s u / (1 + (s - 1) u)

Draw and shift are one launch, which writes 4 bytes per sample and reads nothing.
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
        num: number of samples.
        draw: the key; without a device, the result is on torch's default device.
        shift: s > 0; 1 is uniform, the paper uses 12 for videos.
        backend: "triton", the kernel, or "reference", plain torch, with the same values bit for
            bit. None chooses the kernel on CUDA devices where it can run, else the reference.

    Returns:
        (num,) fp32 in [0, 1], where 0 is data and 1 is noise; values do not depend on the device.

    Raises:
        InputError: for a negative num, a shift that is not above 0 or not finite, a key beyond 64
            bits, and a backend that is unknown or cannot run.
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
    # Rounding to fp32 can turn the quotient into the next number above 1.
    return (u * shift).div_((u * (shift - 1)).add_(1)).clamp_(max=1)


def _fake(inputs: ShiftedTimesteps) -> Tensor:
    return torch.empty(inputs.num, dtype=torch.float32, device=inputs.device)


# The op also contains the reference: a compiler that saw inside it would fuse away its roundings.
timesteps_op = FusedOp("apt::sample_shifted_timesteps", _compute, fake=_fake)
