"""The discriminator's batch under the approximated R1 penalty (APT Eq. 9).

    [ x_real | x_real + sigma * eps | x_fake ],   eps ~ N(0, I)

The noise is drawn where it is added: each input is read once and each output is written once, B + F
samples in and B + P + F out. It depends only on the key, the global index of the sample and the
index of the element, so a recomputed activation gets the same noise.

Shapes: B real samples, P of them perturbed, F generated samples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from apt import philox
from apt.errors import InputError
from apt.kernels.backends import resolve_backend
from apt.kernels.fused_op import FusedOp
from apt.kernels.signatures import PerturbedBatch
from apt.rng import Draw, key_of


def perturbed_batch(
    x_real: Tensor,
    x_fake: Tensor,
    sigma: float,
    draw: Draw,
    *,
    num_perturbed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Lay out real, perturbed and generated samples in one buffer.

    x_real gets gradients through both of its copies, and x_fake gets gradients. The op is linear,
    so it can be differentiated any number of times with either backend.

    Args:
        x_real: (B, ...) real latents.
        x_fake: (F, ...) generated latents of the same sample shape, dtype and device.
        sigma: standard deviation of the perturbation, at least 0.
        draw: the key of the noise, which is drawn on the device of the tensors.
        num_perturbed: P, how many of the first real samples get a perturbed copy; None for all B.
        backend: "triton", the kernel, for fp16, bf16 and fp32; "reference", plain torch, also for
            fp64, which stores the noise. Both give the same values bit for bit. None chooses the
            kernel for CUDA tensors that it can take, else the reference. Inputs that are not
            contiguous are copied.

    Returns:
        (B + P + F, ...) in the dtype of x_real, contiguous; the perturbed copy is rounded once,
        from fp32 (sigma * eps and the sum), or fp64 for fp64 inputs.

    Raises:
        InputError: for inputs that do not fit each other or are not floating point, P outside
            [0, B], a sigma that is negative or not finite, a key beyond 64 bits, and a backend that
            is unknown or cannot run.
    """
    op = "perturbed_batch"
    if (
        0 in (x_real.ndim, x_fake.ndim)
        or x_real.shape[1:] != x_fake.shape[1:]
        or (x_real.dtype, x_real.device) != (x_fake.dtype, x_fake.device)
        or not x_real.is_floating_point()
    ):
        raise InputError(
            f"{op}: x_real and x_fake must be floating point and agree in sample shape, dtype and "
            f"device, got {_describe(x_real)} and {_describe(x_fake)}"
        )
    if not 0 <= sigma < math.inf:
        raise InputError(f"{op}: sigma must be at least 0 and finite, got {sigma}")
    num_real = x_real.shape[0]
    count = num_real if num_perturbed is None else num_perturbed
    if not 0 <= count <= num_real:
        raise InputError(f"{op}: num_perturbed must be in [0, {num_real}], got {count}")
    key = key_of(op, draw, num_real)
    chosen = resolve_backend(op, backend, (x_real, x_fake))
    found: Tensor = perturbed_batch_op(PerturbedBatch(x_real, x_fake, sigma, count, key, chosen))
    return found


def _compute(inputs: PerturbedBatch) -> Tensor:
    if inputs.backend == "triton":
        from apt.kernels._triton import perturbed_batch as fused

        return fused.perturbed_batch(inputs)
    x_real, key, num = inputs.x_real, inputs.key, inputs.num_perturbed
    noisy = x_real[:num]
    size = math.prod(x_real.shape[1:])
    noise = philox.normal(key.number, num, size, first=key.offset, device=x_real.device)
    noise = noise.view(noisy.shape).to(torch.promote_types(x_real.dtype, torch.float32))
    perturbed = noise.mul_(inputs.sigma).add_(noisy)
    return torch.cat((x_real, perturbed.to(x_real.dtype), inputs.x_fake))


def _fake(inputs: PerturbedBatch) -> Tensor:
    x_real = inputs.x_real
    num = x_real.shape[0] + inputs.num_perturbed + inputs.x_fake.shape[0]
    return x_real.new_empty(num, *x_real.shape[1:])


def _save(ctx: Any, inputs: PerturbedBatch, output: Tensor) -> None:
    ctx.num_real, ctx.num_perturbed = inputs.x_real.shape[0], inputs.num_perturbed


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Compute gradients in torch: a view and a sum, which for P = B is as little as in a kernel."""
    num_real, num_perturbed = ctx.num_real, ctx.num_perturbed
    grad_real = grad_fake = None
    if ctx.needs_input_grad[0]:
        grad_real = grad[:num_real]
        if num_perturbed:
            both = grad[:num_perturbed] + grad[num_real : num_real + num_perturbed]
            rest = grad_real[num_perturbed:]
            grad_real = torch.cat((both, rest)) if num_perturbed < num_real else both
    if ctx.needs_input_grad[1]:
        grad_fake = grad[num_real + num_perturbed :]
    return (grad_real, grad_fake, *[None] * 7)


# The op also contains the reference: a compiler that saw inside it would fuse away its roundings.
perturbed_batch_op = FusedOp(
    "apt::perturbed_batch", _compute, fake=_fake, save=_save, gradient=_gradients
)


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
