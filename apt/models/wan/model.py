"""Wan: the public text-to-video transformer of the Wan team (arXiv 2503.20314; Apache-2.0).

Visual tokens attend to each other with 3D rotary positions, then to the text, then go through an
MLP. The model uses LayerNorm, RMSNorm of queries and keys across all heads, one embedding of the
timestep for all blocks, and a learned table in each. Parameters are named as in diffusers'
WanTransformer3DModel.

Casting a model to half precision keeps in fp32 what diffusers keeps in fp32: the timestep
embedding, the modulation tables, and the LayerNorm before the cross-attention. Norms, modulation
and rotary positions are always computed in at least fp32.

Shape suffixes: B samples, R rows of conditions, L visual tokens, S text tokens, D hidden size,
H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from apt.condition import Condition, text_tokens
from apt.distributed.sequence import TokenSplit
from apt.errors import ConfigError, InputError
from apt.flow import FlowAdapter
from apt.kernels import (
    attention,
    modulated_norm,
    norm_rope,
    qk_norm_rope,
    residual_modulated_norm,
)
from apt.kernels.modulated_norm import take_rows
from apt.models.layers import FeedForward, rope_table, timestep_sinusoids
from apt.models.transformer import (
    Context,
    DiffusionTransformer,
    Tokens,
    TransformerBlock,
    check_rotary_heads,
    token_grid,
)

FLOW = FlowAdapter(time_scale=1000.0)
"""Wan's time is 1000 t, and its prediction is our velocity."""

_ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Shape of a `Wan`.

    Attributes:
        in_channels: latent channels C.
        hidden_size, depth, num_heads: D, number of blocks, attention heads.
        mlp_size: width of the MLP.
        patch_size: latents per token along (T, H, W).
        text_dim: embedding dimension of the text encoder.
        text_length: S; every prompt is padded to it with zeros, see `Wan`.
        time_dim: number of sinusoids of the timestep, sines and cosines together.
        max_positions: maximum number of tokens along an axis of the token grid.
        norm_eps: epsilon of all norms.
    """

    in_channels: int = 16
    hidden_size: int = 1536
    depth: int = 30
    num_heads: int = 12
    mlp_size: int = 8960
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_length: int = 512
    time_dim: int = 256
    max_positions: int = 1024
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_rotary_heads(self.hidden_size, self.num_heads)
        if self.depth < 1:
            raise ConfigError(f"depth must be at least 1, got {self.depth}")
        if self.time_dim < 2 or self.time_dim % 2:
            raise ConfigError(
                f"time_dim must be even and at least 2, for sines and cosines, got {self.time_dim}"
            )

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return tokens along (T, H, W).

        Raises InputError for latents that are not multiples of the patch size, and for more than
        `max_positions` tokens along an axis.
        """
        grid = token_grid(latent_shape, self.patch_size)
        if max(grid) > self.max_positions:
            raise InputError(
                f"latents {tuple(latent_shape)} have {grid} tokens along time, height and width, "
                f"but this model accepts at most {self.max_positions} along each; choose a smaller "
                "size"
            )
        return grid

    def build(self) -> Wan:
        return Wan(self)


class KeepsFloat32(nn.Module):
    """A module whose own fp32 parameters stay fp32 when it is cast to a narrower dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.dtype == torch.float32 and result.dtype.itemsize < 4:
                return tensor.to(result.device)
            return result

        if recurse:  # children decide for themselves
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep, recurse=False)


class Float32Linear(KeepsFloat32, nn.Linear):
    """A linear layer that stays fp32."""


class Float32LayerNorm(KeepsFloat32, nn.LayerNorm):
    """A LayerNorm whose weights stay fp32; a fused op reads them."""


class Wan(KeepsFloat32, DiffusionTransformer):
    """Wan's transformer, with the interface of every `DiffusionTransformer`.

    Timesteps may be (R, L), one for each token, for Wan 2.2 TI2V, where given frames have t = 0.
    Text is treated as in diffusers' WanPipeline: it is padded to `text_length` tokens with zeros,
    to which the model attends like words. A mask in the condition selects embeddings to set to
    zero; attention itself is not masked, as in Wan's training.
    """

    output_names = ("scale_shift_table", "proj_out")
    token_timesteps = True
    text_stream = "cross"
    config: WanConfig

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.patch_embedding = nn.Conv3d(
            config.in_channels, d, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, d) / d**0.5)
        self.proj_out = nn.Linear(d, config.in_channels * math.prod(config.patch_size))
        self._init_weights()

    def embed(
        self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None
    ) -> tuple[Tokens, Context]:
        x_BLD = self.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        text_RSD = self.condition_embedder.text_embedder(self._padded(c).to(x_BLD.dtype))
        embedding, modulation = self.condition_embedder.embed_time(t, rows)
        head_dim = self.hidden_size // self.config.num_heads
        rope = rope_table(self.token_grid(x.shape[2:]), head_dim, _ROPE_THETA, x.device)
        return Tokens(x_BLD, text_RSD), Context(embedding, modulation, rows, rope)

    def unembed(self, h_BLD: Tensor, context: Context, x: Tensor, t: Tensor) -> Tensor:
        frames, height, width = self.token_grid(x.shape[2:])
        # (R, 2, D), or (B, L, 2, D)
        table = _wide(self.scale_shift_table[0]) + context.embedding.unsqueeze(-2)
        shift, scale = table.unbind(-2)
        rows, eps = context.modulation_rows, self.config.norm_eps
        y = modulated_norm(h_BLD, scale, shift, norm="layer", eps=eps, rows=rows)
        pt, ph, pw = self.config.patch_size
        velocity = rearrange(
            context.whole(self.proj_out(y)),
            "b (t h w) (p q r c) -> b c (t p) (h q) (w r)",
            t=frames, h=height, w=width, p=pt, q=ph, r=pw,
        )  # fmt: skip
        return FLOW.velocity(velocity)

    def _padded(self, c: Condition) -> Tensor:
        """Return text embeddings (R, text_length, E), with zeros for padding."""
        tokens, mask = text_tokens(c, self.config.text_dim), c.text.mask
        length = tokens.shape[1]
        if length > self.config.text_length:
            raise InputError(
                f"this model accepts at most {self.config.text_length} text tokens, got {length}; "
                "shorten the prompts, or encode them with truncate=True"
            )
        if mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0.0)
        return F.pad(tokens, (0, 0, 0, self.config.text_length - length))

    def _init_weights(self) -> None:
        """Initialise as Wan's authors do: Xavier, small normals for embedders, a zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        embedder = self.condition_embedder
        for mlp in (embedder.time_embedder, embedder.text_embedder):
            nn.init.normal_(mlp.linear_1.weight, std=0.02)
            nn.init.normal_(mlp.linear_2.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)


class ConditionEmbedder(nn.Module):
    """Maps timesteps and text to the hidden size."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.time_dim = config.time_dim
        self.time_embedder = TimeEmbedder(config.time_dim, d)
        self.time_proj = nn.Linear(d, 6 * d)
        self.text_embedder = TextEmbedder(config.text_dim, d)

    def embed_time(self, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map timesteps t (R,) in [0, 1] to embeddings (R, D) and modulation (R, 6, D).

        Both are at least fp32, and blocks add their own tables to the modulation. For timesteps per
        token, (R, L), the results are per sample: (B, L, D) and (B, L, 6, D).
        """
        sinusoids = timestep_sinusoids(FLOW.time(t), self.time_dim)
        embedding = self.time_embedder(sinusoids)
        activated = F.silu(embedding).to(self.time_proj.weight.dtype)
        modulation = _wide(self.time_proj(activated)).unflatten(-1, (6, -1))
        if t.ndim == 2:
            return take_rows(embedding, rows), take_rows(modulation, rows)
        return embedding, modulation


class TimeEmbedder(nn.Module):
    """Maps sinusoids (..., F) fp32 to (..., D) in at least fp32, even inside autocast."""

    def __init__(self, time_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = Float32Linear(time_dim, hidden_size)
        self.linear_2 = Float32Linear(hidden_size, hidden_size)

    def forward(self, sinusoids: Tensor) -> Tensor:
        with torch.autocast(sinusoids.device.type, enabled=False):
            h = self.linear_1(sinusoids.to(self.linear_1.weight.dtype))
            return _wide(self.linear_2(F.silu(h)))


class TextEmbedder(nn.Module):
    """Maps text embeddings (R, S, E) to (R, S, D)."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(tokens), approximate="tanh"))


class WanBlock(KeepsFloat32, TransformerBlock):
    """Self-attention, cross-attention to the text, and an MLP."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.eps = config.norm_eps
        self.attn1 = WanAttention(config)
        self.attn2 = WanAttention(config)
        self.norm2 = Float32LayerNorm(d, config.norm_eps)
        self.ffn = FeedForward(d, config.mlp_size)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, d) / d**0.5)

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        x_BLD, text_RSD = tokens
        rows = context.modulation_rows
        table = _wide(self.scale_shift_table[0]) + context.modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(-2)
        zeros = table.new_zeros(table.shape[0], table.shape[-1])
        ones = torch.ones_like(zeros)

        h = modulated_norm(x_BLD, scale1, shift1, norm="layer", eps=self.eps, rows=rows)
        x_BLD, h = residual_modulated_norm(
            x_BLD, self.attn1.over_itself(h, context.rope, context.visual), gate1, zeros, zeros,
            weight=self.norm2.weight, bias=self.norm2.bias,
            norm="layer", eps=self.eps, rows=rows,
        )  # fmt: skip
        x_BLD, h = residual_modulated_norm(
            x_BLD, self.attn2.over_text(h, text_RSD, context.rows), ones, scale2, shift2,
            norm="layer", eps=self.eps, rows=rows,
        )  # fmt: skip
        gate = gate2 if gate2.ndim == 3 else take_rows(gate2, rows)[:, None]
        # The gate is fp32, so addcmul sums in fp32 without copies of the operands.
        return Tokens(torch.addcmul(x_BLD, self.ffn(h), gate).to(x_BLD.dtype), text_RSD)


class WanAttention(nn.Module):
    """Attention with RMS-normalised queries and keys, one norm across all heads."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.eps = config.norm_eps
        self.to_q = nn.Linear(d, d)
        self.to_k = nn.Linear(d, d)
        self.to_v = nn.Linear(d, d)
        self.to_out = nn.ModuleList([nn.Linear(d, d)])
        self.norm_q = nn.RMSNorm(d, eps=config.norm_eps)
        self.norm_k = nn.RMSNorm(d, eps=config.norm_eps)

    def over_itself(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor] | tuple[None, None],
        split: TokenSplit | None,
    ) -> Tensor:
        """Self-attention of visual tokens (B, L, D); if split, of this rank's to all ranks'."""
        q, k, v = (self._heads(project(h)) for project in (self.to_q, self.to_k, self.to_v))
        weights = self.norm_q.weight, self.norm_k.weight
        q, k = qk_norm_rope(q, k, *weights, *rope, eps=self.eps, across_heads=True)
        return self.to_out[0](attention(q, k, v, queries=split, keys=split).flatten(2))

    def over_text(self, h: Tensor, text_RSD: Tensor, rows: Tensor | None) -> Tensor:
        """Cross-attention of visual tokens (B, L, D) to text (R, S, D), projected once per row."""
        q, k = self._heads(self.to_q(h)), self._heads(self.to_k(text_RSD))
        q = norm_rope(q, self.norm_q.weight, eps=self.eps, across_heads=True)
        k = norm_rope(k, self.norm_k.weight, eps=self.eps, across_heads=True)
        v = self._heads(self.to_v(text_RSD))
        k, v = take_rows(k, rows), take_rows(v, rows)
        return self.to_out[0](attention(q, k, v).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


def _wide(x: Tensor) -> Tensor:
    """Return the tensor in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
