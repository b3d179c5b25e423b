"""The discriminator's batch under the approximated R1 penalty (APT Eq. 9).

[ x_real | x_real + sigma * eps | x_fake ],   eps ~ N(0, I)
"""

from __future__ import annotations

import torch
from torch import Tensor

from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.rng import sample_noise


def perturbed_batch(
    x_real: Tensor,
    x_fake: Tensor,
    sigma: float,
    *,
    seed: int,
    step: int,
    offset: int,
    num_perturbed: int | None = None,
    stream: str = "perturbation",
    backend: str | None = None,
) -> Tensor:
    """Lay out real, perturbed and generated samples in one buffer.

    Gradients reach x_real through both of its copies, and x_fake.

    Args:
        x_real: (B, ...) real latents.
        x_fake: (F, ...) generated latents of the same sample shape, dtype and device.
        sigma: standard deviation of the perturbation, at least 0.
        seed, step, stream: the key of the noise.
        offset: global index of the first real sample, so that the noise of a sample does not
            depend on ranks or splits.
        num_perturbed: P, how many of the first real samples get a perturbed copy; None for all B.
        backend: None chooses; "reference" draws the noise on the CPU.

    Returns:
        (B + P + F, ...) in the dtype of x_real; the perturbed copy is rounded once, from fp32.

    Raises:
        InputError: inputs that do not fit each other, P outside [0, B], a negative sigma, an
            unknown backend.
    """
    resolve_backend("perturbed_batch", backend)
    if x_real.shape[1:] != x_fake.shape[1:] or x_real.dtype != x_fake.dtype:
        raise InputError(
            "perturbed_batch: x_real and x_fake must agree in sample shape and dtype, got "
            f"{tuple(x_real.shape)} {x_real.dtype} and {tuple(x_fake.shape)} {x_fake.dtype}"
        )
    if not sigma >= 0:
        raise InputError(f"perturbed_batch: sigma must be at least 0, got {sigma}")
    count = x_real.shape[0] if num_perturbed is None else num_perturbed
    if not 0 <= count <= x_real.shape[0]:
        raise InputError(
            f"perturbed_batch: num_perturbed must be in [0, {x_real.shape[0]}], got {count}"
        )
    noise = sample_noise(
        count,
        x_real.shape[1:],
        seed=seed,
        step=step,
        offset=offset,
        stream=stream,
        device=x_real.device,
        dtype=torch.promote_types(x_real.dtype, torch.float32),
    )
    perturbed = torch.add(x_real[:count], noise, alpha=sigma).to(x_real.dtype)
    return torch.cat((x_real, perturbed, x_fake))
