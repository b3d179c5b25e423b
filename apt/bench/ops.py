"""The ops that are measured. Adding one is one `Op(...)` in OPS.

Shapes: B samples, L tokens, D channels, H heads, Dh channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apt import kernels
from apt.bench import peers
from apt.bench.shapes import Shape
from apt.kernels import backends, costs
from apt.kernels.attention import BACKENDS as ATTENTION_BACKENDS
from apt.kernels.costs import OpCost

Inputs = dict[str, Any]  # tensors, by the names of arguments
Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Random:
    """Draws the inputs of an op, anew for every case: zeros would be faster, and hide mistakes."""

    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *size: int) -> Tensor:
        """N(0, 1) in the case's dtype."""
        device = self.generator.device
        return torch.randn(size, generator=self.generator, device=device).to(self.dtype)

    def positive(self, *size: int) -> Tensor:
        """Around 1, as the weights of norms are, in fp32."""
        device = self.generator.device
        return 1 + 0.1 * torch.randn(size, generator=self.generator, device=device)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op of `apt.kernels`, and everything needed to measure it.

    Attributes:
        name: as in `apt.kernels`.
        draw: the inputs at a shape.
        call: the op on inputs with one of its backends.
        gradients: the inputs that the backward differentiates; empty: the op has no backward.
        cost: bytes and FLOPs at a shape and dtype, of the forward or (True) the backward.
        variants: names to backends.
        exact: fp64 inputs to the result that all are held against.
        peers: the same function from other packages; they raise InputError where they cannot run.
        compiled: also measure `torch.compile` of the reference.
        check_tokens: correctness is checked on this many tokens at most: fp64 attention over all
            would not fit.
        unit: which ceiling the op is held to: "copy" bandwidth, or "matmul" throughput.
    """

    name: str
    draw: Callable[[Shape, Random], Inputs]
    call: Callable[[Inputs, str], Outputs]
    gradients: tuple[str, ...]
    cost: Callable[[Shape, torch.dtype, bool], OpCost]
    variants: Mapping[str, str] = field(
        default_factory=lambda: {"triton": "triton", "eager": "reference"}
    )
    exact: str = "reference"
    peers: Mapping[str, Function] = field(default_factory=dict)
    compiled: bool = True
    check_tokens: int | None = None
    unit: str = "copy"


def _modulation(shape: Shape, random: Random, *names: str) -> Inputs:
    return {name: random.normal(shape.batch, shape.width) for name in names}


def _tokens(shape: Shape, random: Random, *names: str) -> Inputs:
    return {name: random.normal(shape.batch, shape.tokens, shape.width) for name in names}


def _heads(shape: Shape, random: Random, *names: str) -> Inputs:
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return {name: random.normal(*size) for name in names}


def _draw_qk(shape: Shape, random: Random) -> Inputs:
    angles = 10 * random.positive(shape.tokens, shape.head_dim // 2)
    weights = {name: random.positive(shape.head_dim) for name in ("q_weight", "k_weight")}
    return _heads(shape, random, "q", "k") | weights | {"cos": angles.cos(), "sin": angles.sin()}


def _draw_latents(shape: Shape, random: Random) -> Inputs:
    size = (shape.batch, shape.latent_values)
    return {name: random.normal(*size) for name in ("x_real", "x_fake")}


_KEY: dict[str, Any] = {"seed": 1, "step": 2, "offset": 3}

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            name="modulated_norm",
            draw=lambda s, r: _tokens(s, r, "x") | _modulation(s, r, "scale", "shift"),
            call=lambda inputs, backend: kernels.modulated_norm(**inputs, backend=backend),
            gradients=("x", "scale", "shift"),
            cost=lambda s, dtype, backward: costs.modulated_norm_cost(
                s.batch, s.tokens, s.width, dtype=dtype, backward=backward
            ),
            peers={"liger": peers.liger_modulated_norm},
        ),
        Op(
            name="residual_modulated_norm",
            draw=lambda s, r: (
                _tokens(s, r, "x", "update") | _modulation(s, r, "gate", "scale", "shift")
            ),
            call=lambda inputs, backend: kernels.residual_modulated_norm(**inputs, backend=backend),
            gradients=("x", "update", "gate", "scale", "shift"),
            cost=lambda s, dtype, backward: costs.residual_modulated_norm_cost(
                s.batch, s.tokens, s.width, dtype=dtype, backward=backward
            ),
            peers={"liger": peers.liger_residual_modulated_norm},
        ),
        Op(
            name="qk_norm_rope",
            draw=_draw_qk,
            call=lambda inputs, backend: kernels.qk_norm_rope(**inputs, backend=backend),
            gradients=("q", "k", "q_weight", "k_weight"),
            cost=lambda s, dtype, backward: costs.qk_norm_rope_cost(
                s.batch, s.tokens, s.heads, s.head_dim, dtype=dtype, backward=backward
            ),
        ),
        Op(
            name="perturbed_batch",
            draw=_draw_latents,
            call=lambda inputs, backend: kernels.perturbed_batch(
                **inputs, sigma=0.1, **_KEY, backend=backend
            ),
            gradients=("x_real", "x_fake"),
            cost=lambda s, dtype, backward: costs.perturbed_batch_cost(
                s.batch, s.batch, s.latent_values, dtype=dtype, backward=backward
            ),
            compiled=False,  # draws from a counter-based generator, which is no torch op
        ),
        Op(
            name="attention",
            draw=lambda s, r: _heads(s, r, "q", "k", "v"),
            call=lambda inputs, backend: kernels.attention(**inputs, backend=backend),
            gradients=("q", "k", "v"),
            cost=lambda s, dtype, backward: costs.attention_cost(
                s.batch, s.tokens, s.tokens, s.heads, s.head_dim, dtype=dtype, backward=backward
            ),
            variants={name: name for name in ATTENTION_BACKENDS if name != "_native_math"},
            exact="_native_math",
            compiled=False,
            check_tokens=2048,
            unit="matmul",
        ),
    )
}


def variants_of(op: Op) -> dict[str, Function]:
    """Ours and torch's, by name; a backend that the op does not have yet is left out."""
    known = backends.OPS.get(op.name, tuple(op.variants.values()))

    def bind(backend: str) -> Function:
        return lambda inputs: op.call(inputs, backend)

    return {name: bind(backend) for name, backend in op.variants.items() if backend in known}


def exact_inputs(inputs: Mapping[str, Tensor]) -> Inputs:
    """The same values in fp64, as leaves of their own."""
    return {
        name: (value.detach().double() if value.is_floating_point() else value).requires_grad_(
            value.requires_grad
        )
        for name, value in inputs.items()
    }
