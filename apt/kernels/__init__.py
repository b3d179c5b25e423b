"""Fused ops for diffusion transformers, usable on their own.

Every op is a function that takes `backend=`. `kernel_status()` and `attention_status()` list what
runs on this machine.
"""

from __future__ import annotations

from apt.kernels.attention import (
    attention,
    attention_backend,
    attention_kernel,
    attention_status,
    current_attention_backend,
)
from apt.kernels.attention_choice import watch_attention
from apt.kernels.backends import (
    BackendStatus,
    current_kernel_backend,
    kernel_backend,
    kernel_status,
    watch_kernels,
)
from apt.kernels.fused_rmsprop import FusedRMSprop
from apt.kernels.modulated_norm import modulated_norm, residual_modulated_norm
from apt.kernels.norm_rope import joint_qk_norm_rope, norm_rope, qk_norm_rope
from apt.kernels.perturbed_batch import perturbed_batch
from apt.kernels.query_pooling import query_pooling
from apt.kernels.sample_shifted_timesteps import sample_shifted_timesteps
from apt.kernels.signatures import StreamQKV

__all__ = [
    "BackendStatus",
    "FusedRMSprop",
    "StreamQKV",
    "attention",
    "attention_backend",
    "attention_kernel",
    "attention_status",
    "current_attention_backend",
    "current_kernel_backend",
    "joint_qk_norm_rope",
    "kernel_backend",
    "kernel_status",
    "modulated_norm",
    "norm_rope",
    "perturbed_batch",
    "qk_norm_rope",
    "query_pooling",
    "residual_modulated_norm",
    "sample_shifted_timesteps",
    "watch_attention",
    "watch_kernels",
]
