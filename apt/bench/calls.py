"""Calls of ops that do more than pass on their inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.rmsprop import rmsprop as rmsprop_functional

from apt.bench.inputs import Inputs
from apt.errors import InputError
from apt.kernels import StreamQKV, joint_qk_norm_rope
from apt.kernels.fused_rmsprop import rmsprop_reference
from apt.kernels.signatures import RMSpropOptions, RMSpropStep

# About as many as a block of a DiT has, so that one launch for all differs from one for each
_TENSORS = 16
_OPTIONS: dict[str, Any] = {"lr": 1e-4, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.0}
_EMA_DECAY = 0.995


def joint(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """Call `joint_qk_norm_rope` on a visual stream, which is rotated, and a text stream."""

    def stream(name: str, *tables: Tensor) -> StreamQKV:
        parts = (inputs[f"{name}_{part}"] for part in ("qkv", "q_weight", "k_weight"))
        return StreamQKV(*parts, *tables)

    streams = [stream("visual", inputs["cos"], inputs["sin"]), stream("text")]
    return joint_qk_norm_rope(streams, backend=backend)


def rmsprop(inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """Take one step of `FusedRMSprop` in place, with an average of the weights."""
    params, grads, squares, averages = _columns(inputs)
    options = RMSpropOptions(**_OPTIONS)
    step = RMSpropStep(params, grads, squares, averages, options, _EMA_DECAY)
    if backend == "triton":
        from apt.kernels._triton.fused_rmsprop import fused_rmsprop_op

        fused_rmsprop_op(step)
    else:
        rmsprop_reference(step)
    return _state(inputs)


def foreach_rmsprop(inputs: Inputs) -> tuple[Tensor, ...]:
    """Take the same step with torch's foreach form, as `torch.optim.RMSprop` does on a GPU."""
    if inputs["parameters"].dtype != inputs["square_averages"].dtype:
        raise InputError("torch's RMSprop keeps its state in the parameters' dtype, ours in fp32")
    columns = _columns(inputs)
    params, grads, squares, _ = columns
    options: dict[str, Any] = {"momentum": 0.0, "centered": False, "foreach": True}
    steps = [torch.zeros(()) for _ in params]
    rmsprop_functional(params, grads, squares, [], [], steps, **_OPTIONS, **options)
    _average(columns)
    return _state(inputs)


def cross_attention(inputs: Inputs) -> Tensor:
    """Do what `query_pooling` replaces: norm, keys and values of all tokens, attention."""
    x, h = inputs["x"], inputs["num_heads"]
    normed = F.rms_norm(x, x.shape[-1:], inputs["norm_weight"], 1e-6)
    k = F.linear(normed, inputs["key_weight"])
    v = F.linear(normed, inputs["value_weight"], inputs["value_bias"])
    q = inputs["query"].expand(x.shape[0], 1, -1)
    q, k, v = (values.unflatten(-1, (h, -1)).transpose(1, 2) for values in (q, k, v))
    pooled = F.scaled_dot_product_attention(q, k, v)
    return pooled.transpose(1, 2).flatten(1)


def _columns(inputs: Inputs) -> list[list[Tensor]]:
    names = ("parameters", "gradients", "square_averages", "averages")
    return [list(inputs[name].chunk(_TENSORS)) for name in names]


def _average(columns: list[list[Tensor]]) -> None:
    params, averages = columns[0], columns[3]
    values = [p.to(average.dtype) for p, average in zip(params, averages, strict=True)]
    torch._foreach_lerp_(averages, values, 1 - _EMA_DECAY)


def _state(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs["parameters"], inputs["square_averages"], inputs["averages"]
