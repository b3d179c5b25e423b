"""The ops that are measured. To add one, add an `Op(...)` to OPS."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apt import kernels
from apt.bench import calls, inputs, peers
from apt.bench.inputs import Inputs, Random
from apt.bench.shapes import Shape
from apt.kernels import backends, costs
from apt.kernels.attention import BACKENDS as ATTENTION_BACKENDS
from apt.kernels.costs import OpCost
from apt.rng import Draw

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[[Inputs], Outputs]

OURS = {"triton": "triton", "eager": "reference"}


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op of `apt.kernels`, and everything needed to measure it.

    Attributes:
        name: as in `apt.kernels.kernel_status`, or "attention".
        draw: draws the inputs at a shape.
        call: calls the op on inputs with one of its backends.
        gradients: inputs that the backward pass differentiates; empty if there is none.
        cost: returns bytes and FLOPs at a shape and dtype, of the forward pass or (True) backward.
        variants: backends by name.
        exact: the backend that computes the correct result from fp64 inputs.
        peers: the same function from other packages; they raise InputError if they cannot run.
        compiled: also measure `torch.compile` of the reference.
        mutates: the op writes to its inputs.
        dtype: dtype of the op, whatever the models compute in; None takes the shape's.
        check_tokens: the most tokens that correctness is checked on, where fp64 would not fit into
            memory otherwise; None for all.
    """

    name: str
    draw: Callable[[Shape, Random], Inputs]
    call: Callable[[Inputs, str], Outputs]
    gradients: tuple[str, ...]
    cost: Callable[[Shape, torch.dtype, bool], OpCost]
    variants: Mapping[str, str] = field(default_factory=lambda: OURS)
    exact: str = "reference"
    peers: Mapping[str, Function] = field(default_factory=dict)
    compiled: bool = True
    mutates: bool = False
    dtype: torch.dtype | None = None
    check_tokens: int | None = None


_DRAW = Draw(seed=1, step=2, offset=3)


def _joint_cost(shape: Shape, dtype: torch.dtype, backward: bool) -> OpCost:
    lengths = {True: shape.tokens, False: inputs.text_tokens(shape)}
    return sum(
        (
            costs.qk_norm_rope_cost(
                shape.batch, length, shape.heads, shape.head_dim, dtype=dtype, rope=rope, copied=1,
                backward=backward,
            )
            for rope, length in lengths.items()
        ),
        OpCost(),
    )  # fmt: skip


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            name="modulated_norm",
            draw=lambda s, r: (
                inputs.tokens(s, r, "x") | inputs.modulation(s, r, "scale", "shift")
            ),
            call=lambda i, backend: kernels.modulated_norm(**i, backend=backend),
            gradients=("x", "scale", "shift"),
            cost=lambda s, dtype, backward: costs.modulated_norm_cost(
                s.batch, s.tokens, s.width, dtype=dtype, backward=backward
            ),
            peers={"liger": peers.liger_modulated_norm},
        ),
        Op(
            name="residual_modulated_norm",
            draw=lambda s, r: (
                inputs.tokens(s, r, "x", "update")
                | inputs.modulation(s, r, "gate", "scale", "shift")
            ),
            call=lambda i, backend: kernels.residual_modulated_norm(**i, backend=backend),
            gradients=("x", "update", "gate", "scale", "shift"),
            cost=lambda s, dtype, backward: costs.residual_modulated_norm_cost(
                s.batch, s.tokens, s.width, dtype=dtype, backward=backward
            ),
            peers={"liger": peers.liger_residual_modulated_norm},
        ),
        Op(
            name="norm_rope",
            draw=inputs.queries,
            call=lambda i, backend: kernels.norm_rope(**i, backend=backend),
            gradients=("x", "weight"),
            cost=lambda s, dtype, backward: costs.qk_norm_rope_cost(
                s.batch, s.tokens, s.heads, s.head_dim, num_tensors=1, dtype=dtype,
                backward=backward,
            ),
        ),
        Op(
            name="qk_norm_rope",
            draw=inputs.qk,
            call=lambda i, backend: kernels.qk_norm_rope(**i, backend=backend),
            gradients=("q", "k", "q_weight", "k_weight"),
            cost=lambda s, dtype, backward: costs.qk_norm_rope_cost(
                s.batch, s.tokens, s.heads, s.head_dim, dtype=dtype, backward=backward
            ),
        ),
        Op(
            name="joint_qk_norm_rope",
            draw=inputs.joint_qkv,
            call=calls.joint,
            gradients=(
                "visual_qkv", "visual_q_weight", "visual_k_weight",
                "text_qkv", "text_q_weight", "text_k_weight",
            ),
            cost=_joint_cost,
        ),
        Op(
            name="sample_shifted_timesteps",
            draw=lambda s, r: {
                "num": s.batch * s.tokens,
                "draw": dataclasses.replace(_DRAW, device=r.generator.device),
            },
            call=lambda i, backend: kernels.sample_shifted_timesteps(
                **i, shift=12.0, backend=backend
            ),
            gradients=(),
            cost=lambda s, _, __: costs.sample_shifted_timesteps_cost(s.batch * s.tokens),
            compiled=False,  # the reference is written to be correct, not fast
            dtype=torch.float32,
        ),
        Op(
            name="perturbed_batch",
            draw=lambda s, r: inputs.latents(s, r, "x_real", "x_fake"),
            call=lambda i, backend: kernels.perturbed_batch(
                **i, sigma=0.1, draw=_DRAW, backend=backend
            ),
            gradients=("x_real", "x_fake"),
            cost=lambda s, dtype, backward: costs.perturbed_batch_cost(
                s.batch, s.batch, s.latent_values, dtype=dtype, backward=backward
            ),
            compiled=False,  # as above
        ),
        Op(
            name="query_pooling",
            draw=inputs.pooling,
            call=lambda i, backend: kernels.query_pooling(**i, backend=backend),
            gradients=(
                "x", "query", "key_weight", "value_weight", "value_bias", "norm_weight",
            ),
            cost=lambda s, dtype, backward: costs.query_pooling_cost(
                s.batch, s.tokens, s.width, s.heads, dtype=dtype, backward=backward
            ),
            peers={"cross_attention": calls.cross_attention},
        ),
        Op(
            name="fused_rmsprop",
            draw=inputs.optimizer,
            call=calls.rmsprop,
            gradients=(),
            cost=lambda s, dtype, _: costs.fused_rmsprop_cost(
                s.batch * s.tokens * s.width, dtype=dtype
            ),
            peers={"foreach": calls.foreach_rmsprop},
            compiled=False,  # optimizers are compiled in another way
            mutates=True,
            dtype=torch.float32,  # mixed precision trains fp32 weights
        ),
        Op(
            name="attention",
            draw=lambda s, r: inputs.heads(s, r, "q", "k", "v"),
            call=lambda i, backend: kernels.attention(**i, backend=backend),
            gradients=("q", "k", "v"),
            cost=lambda s, dtype, backward: costs.attention_cost(
                s.batch, s.tokens, s.tokens, s.heads, s.head_dim, dtype=dtype, backward=backward
            ),
            variants={name: name for name in ATTENTION_BACKENDS if name != "_native_math"},
            exact="_native_math",
            compiled=False,
            check_tokens=2048,
        ),
    )
}  # fmt: skip


def variants_of(op: Op) -> dict[str, Function]:
    """Return an op's variants by name, without backends that the op does not have."""
    known = backends.OPS.get(op.name, tuple(op.variants.values()))

    def bind(backend: str) -> Function:
        return lambda values: op.call(values, backend)

    return {name: bind(backend) for name, backend in op.variants.items() if backend in known}
