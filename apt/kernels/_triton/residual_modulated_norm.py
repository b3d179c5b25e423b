"""`residual_modulated_norm` in Triton: the kernels of `modulated_norm` with an update."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apt.kernels._triton.modulated_norm import (
    each_token,
    fake_stats,
    gradients,
    launch_forward,
    save,
    spread,
)
from apt.kernels.fused_op import FusedOp
from apt.kernels.signatures import ResidualModulatedNorm


def _forward(inputs: ResidualModulatedNorm) -> tuple[Tensor, Tensor, Tensor]:
    x_new, y, stats = launch_forward(*inputs)
    assert x_new is not None
    return x_new, y, stats


def _fake(inputs: ResidualModulatedNorm) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs.norm.x
    return x.new_empty(x.shape), x.new_empty(x.shape), fake_stats(inputs.norm)


def _save(ctx: Any, inputs: ResidualModulatedNorm, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_new, _, stats = output
    save(ctx, inputs.norm, x_new, stats, inputs.update, inputs.gate)


def _gradients(
    ctx: Any, grad_x_new: Tensor | None, grad_y: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    *_, of_gate = needed = ctx.needs_input_grad
    of_norm, *others = gradients(ctx, grad_y, grad_x_new, any(needed[1:5]) or of_gate)
    return (*of_norm, *others)


residual_modulated_norm_op = FusedOp(
    "apt::residual_modulated_norm", _forward, fake=_fake, save=_save, gradient=_gradients
)


def residual_modulated_norm(inputs: ResidualModulatedNorm) -> tuple[Tensor, Tensor]:
    """Call the op, without checks."""
    norm, gate = inputs.norm, inputs.gate
    if not norm.scale.ndim == norm.shift.ndim == gate.ndim:
        inputs = inputs._replace(norm=each_token(norm), gate=spread(gate, norm.x))
    x_new, y, _ = residual_modulated_norm_op(inputs)
    return x_new, y
