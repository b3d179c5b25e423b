"""Shifted timesteps of the discriminator's ensemble (APT Eqs. 6-7).

u ~ U[0, 1),   t = s u / (1 + (s - 1) u)
"""

from __future__ import annotations

import torch
from torch import Tensor

from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.rng import sample_uniform


def sample_shifted_timesteps(
    num: int,
    *,
    shift: float,
    seed: int,
    step: int,
    offset: int,
    stream: str = "timesteps",
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw one timestep per sample, shifted towards noise by Eq. 7.

    Args:
        num: samples to draw for.
        shift: s > 0; 1 is uniform, the paper takes 12 for videos.
        seed, step, stream: the key of the draw.
        offset: global index of the first sample, so that values do not depend on ranks or splits.
        device: of the result.
        backend: None chooses; "reference" draws on the CPU.

    Returns:
        (num,) fp32 in [0, 1], where 0 is data and 1 is noise.

    Raises:
        InputError: shift not above 0, an unknown backend.
    """
    resolve_backend("sample_shifted_timesteps", backend)
    if not shift > 0:
        raise InputError(f"sample_shifted_timesteps: shift must be above 0, got {shift}")
    u = sample_uniform(num, seed=seed, step=step, offset=offset, stream=stream)
    return (shift * u / (1 + (shift - 1) * u)).to(device)
