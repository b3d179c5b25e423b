"""Wan: the public text-to-video transformer of the Wan team (arXiv 2503.20314; Apache-2.0).

Visual tokens attend to each other with 3D rotary positions, then to the text, then pass an MLP.
LayerNorm, RMSNorm of queries and keys across all heads, one embedding of the timestep for all
blocks and a learned table in each. Parameters are named as in diffusers' WanTransformer3DModel.

Casting a model to half precision leaves in fp32 what diffusers keeps there: the timestep
embedding, the modulation tables, and the LayerNorm before the cross-attention. Norms, modulation
and rotary positions are computed in fp32 whatever the weights are.

Shape suffixes: B samples, R rows of conditions, L visual tokens, S text tokens, D hidden size,
H heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt.errors import ConfigError, InputError
from apt.hub.info import SampleInfo, SamplingInfo
from apt.hub.pretrained import PretrainedEntry
from apt.kernels import (
    attention,
    modulated_norm,
    norm_rope,
    qk_norm_rope,
    residual_modulated_norm,
)
from apt.kernels.rows import take_rows
from apt.models.conditions import TextCondition
from apt.models.families import FlowAdapter
from apt.models.registry import MODELS
from apt.models.tokens import FeedForward, check_layers, check_rows, rope_table, token_grid

FLOW = FlowAdapter(time_scale=1000.0)
"""Wan's time is 1000 t, and its prediction is our velocity."""

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The fixed negative prompt that Wan's authors sample with, and its users distil with."""

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
        time_dim: sinusoids of the timestep, sines and cosines together.
        max_positions: the longest axis of the token grid.
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
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must split into {self.num_heads} heads of an even "
                "size; change one of them"
            )
        if self.hidden_size // self.num_heads < 6:
            raise ConfigError("a head needs at least 6 dimensions for rotary positions in 3D")
        if self.depth < 1:
            raise ConfigError(f"depth must be at least 1, got {self.depth}")
        if self.time_dim < 2 or self.time_dim % 2:
            raise ConfigError(f"time_dim must be even, sines and cosines, got {self.time_dim}")

    def token_grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along (T, H, W).

        Raises InputError if the patch size does not divide, or for more than `max_positions`.
        """
        grid = token_grid(latent_shape, self.patch_size)
        if max(grid) > self.max_positions:
            raise InputError(
                f"latents of {latent_shape} are {grid} tokens along time, height and width; this "
                f"model takes up to {self.max_positions} along each"
            )
        return grid

    def build(self) -> Wan:
        return Wan(self)


class KeepsFloat32(nn.Module):
    """A module whose own fp32 parameters stay fp32 when it is cast to a narrower type."""

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
    """A LayerNorm whose weights stay fp32; they are read by a fused op."""


class Wan(KeepsFloat32):
    """A velocity network over latents (B, C, T, H, W); see `apt.models.protocols.Backbone`.

    Text is as in diffusers' WanPipeline: embeddings of padding are zeros, up to `text_length`
    tokens, and are attended to like words. A mask in the condition says which embeddings are set
    to zero; nothing is masked in the attention, which Wan was trained without.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = d = config.hidden_size
        self.depth = config.depth
        self.in_channels = config.in_channels
        self.checkpointing = False
        self.patch_embedding = nn.Conv3d(
            config.in_channels, d, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, d) / d**0.5)
        self.proj_out = nn.Linear(d, config.in_channels * math.prod(config.patch_size))
        self._init_weights()

    def forward(
        self, x: Tensor, t: Tensor, c: TextCondition, *, rows: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, T, H, W).

        Args:
            x: latents (B, C, T, H, W).
            t: timesteps in [0, 1]: (R,), or (R, L) one for each token, as Wan 2.2 TI2V needs when
                frames that are given have t = 0.
            c: R rows of text, at most `text_length` tokens.
            rows: (B,) int64, the row of `t` and `c` for each sample; None if R = B.

        Raises:
            InputError: for latents that the patch size does not divide or that are too large, rows
                that do not match, or text that is too long.
        """
        grid = self.token_grid(tuple(x.shape[2:]))
        hidden, time = self._run(x, t, c, rows, layers=(self.depth,))
        # (R, 2, D), or (B, L, 2, D)
        table = _wide(self.scale_shift_table[0]) + time.embedding.unsqueeze(-2)
        shift, scale = table.unbind(-2)
        y = modulated_norm(
            hidden[0], scale, shift, norm="layer", eps=self.config.norm_eps, rows=time.rows
        )
        pt, ph, pw = self.config.patch_size
        velocity = rearrange(
            self.proj_out(y),
            "b (t h w) (p q r c) -> b c (t p) (h q) (w r)",
            t=grid[0], h=grid[1], w=grid[2], p=pt, q=ph, r=pw,
        )  # fmt: skip
        return FLOW.velocity(velocity)

    def hidden_states(
        self,
        x: Tensor,
        t: Tensor,
        c: TextCondition,
        *,
        layers: Sequence[int],
        rows: Tensor | None = None,
    ) -> list[Tensor]:
        """Visual tokens (B, L, D) after each block of `layers`, counted from 1."""
        return self._run(x, t, c, rows, layers)[0]

    def token_grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """As of its config."""
        return self.config.token_grid(latent_shape)

    def block_list(self) -> list[WanBlock]:
        """The transformer blocks in order."""
        return cast("list[WanBlock]", list(self.blocks))

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass."""
        self.checkpointing = enabled

    def keep_hidden_states(self, last_layer: int) -> None:
        """Delete the blocks after `last_layer`, and the output layers."""
        del self.blocks[last_layer:]
        self.depth = last_layer
        del self.scale_shift_table, self.proj_out

    def _run(
        self,
        x: Tensor,
        t: Tensor,
        c: TextCondition,
        rows: Tensor | None,
        layers: Sequence[int],
    ) -> tuple[list[Tensor], TimeCondition]:
        """Hidden tokens after `layers`, and what the timestep gives."""
        check_layers(layers, self.depth)
        grid = self.token_grid(tuple(x.shape[2:]))
        check_rows(x, t, c, rows, num_tokens=math.prod(grid))
        x_BLD = self.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        text_RSD = self.condition_embedder.text_embedder(self._padded(c).to(x_BLD.dtype))
        time = self.condition_embedder.embed_time(t, rows)
        rope = rope_table(grid, self.hidden_size // self.config.num_heads, _ROPE_THETA, x.device)

        collected: dict[int, Tensor] = {}
        for number, block in enumerate(self.block_list()[: max(layers)], start=1):
            inputs = (x_BLD, text_RSD, time, rope, rows)
            if self.checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BLD = block(*inputs)
            collected[number] = x_BLD
        return [collected[layer] for layer in layers], time

    def _padded(self, c: TextCondition) -> Tensor:
        """Text embeddings (R, text_length, E), zeros where there is no word."""
        length = c.tokens.shape[1]
        if length > self.config.text_length:
            raise InputError(
                f"this model takes up to {self.config.text_length} text tokens, got {length}; "
                "shorten the prompts, or encode them with truncate=True"
            )
        tokens = c.tokens if c.mask is None else c.tokens.masked_fill(~c.mask[..., None], 0.0)
        return F.pad(tokens, (0, 0, 0, self.config.text_length - length))

    def _init_weights(self) -> None:
        """As Wan's authors: Xavier, narrow normals around the conditions, and an output of zero."""
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


class TimeCondition(NamedTuple):
    """What the timestep gives, in at least fp32.

    Attributes:
        embedding: (R, D), or (B, L, D) for timesteps per token.
        modulation: (R, 6, D) or (B, L, 6, D), before a block's own table.
        rows: (B,) the row of each sample; None if there is one for each.
    """

    embedding: Tensor
    modulation: Tensor
    rows: Tensor | None


class ConditionEmbedder(nn.Module):
    """Timesteps and text to the hidden size."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.time_dim = config.time_dim
        self.time_embedder = TimeEmbedder(config.time_dim, d)
        self.time_proj = nn.Linear(d, 6 * d)
        self.text_embedder = TextEmbedder(config.text_dim, d)

    def embed_time(self, t: Tensor, rows: Tensor | None) -> TimeCondition:
        """Embed timesteps t (R,) or (R, L) in [0, 1]; those per token are given to samples here."""
        sinusoids = timestep_sinusoids(FLOW.time(t), self.time_dim)
        embedding = self.time_embedder(sinusoids)
        activated = F.silu(embedding).to(self.time_proj.weight.dtype)
        modulation = _wide(self.time_proj(activated)).unflatten(-1, (6, -1))
        if t.ndim == 1:
            return TimeCondition(embedding, modulation, rows)
        return TimeCondition(take_rows(embedding, rows), take_rows(modulation, rows), None)


class TimeEmbedder(nn.Module):
    """Sinusoids (..., F) fp32 to (..., D) in at least fp32, also under autocast."""

    def __init__(self, time_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = Float32Linear(time_dim, hidden_size)
        self.linear_2 = Float32Linear(hidden_size, hidden_size)

    def forward(self, sinusoids: Tensor) -> Tensor:
        with torch.autocast(sinusoids.device.type, enabled=False):
            h = self.linear_1(sinusoids.to(self.linear_1.weight.dtype))
            return _wide(self.linear_2(F.silu(h)))


class TextEmbedder(nn.Module):
    """Text embeddings (R, S, E) to (R, S, D)."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(tokens), approximate="tanh"))


class WanBlock(KeepsFloat32):
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

    def forward(
        self,
        x_BLD: Tensor,
        text_RSD: Tensor,
        time: TimeCondition,
        rope: tuple[Tensor, Tensor],
        rows: Tensor | None,
    ) -> Tensor:
        """Visual tokens (B, L, D) after the block; `rows` says which text each sample reads."""
        table = _wide(self.scale_shift_table[0]) + time.modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(-2)
        zeros = table.new_zeros(table.shape[0], table.shape[-1])
        ones = torch.ones_like(zeros)

        h = modulated_norm(x_BLD, scale1, shift1, norm="layer", eps=self.eps, rows=time.rows)
        x_BLD, h = residual_modulated_norm(
            x_BLD, self.attn1.over_itself(h, rope), gate1, zeros, zeros,
            weight=self.norm2.weight, bias=self.norm2.bias,
            norm="layer", eps=self.eps, rows=time.rows,
        )  # fmt: skip
        x_BLD, h = residual_modulated_norm(
            x_BLD, self.attn2.over_text(h, text_RSD, rows), ones, scale2, shift2,
            norm="layer", eps=self.eps, rows=time.rows,
        )  # fmt: skip
        gate = gate2 if gate2.ndim == 3 else take_rows(gate2, time.rows)[:, None]
        # The gate is fp32, so the sum is too, without copies of the operands
        return torch.addcmul(x_BLD, self.ffn(h), gate).to(x_BLD.dtype)


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

    def over_itself(self, h: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Self-attention of visual tokens (B, L, D)."""
        q, k, v = (self._heads(project(h)) for project in (self.to_q, self.to_k, self.to_v))
        weights = self.norm_q.weight, self.norm_k.weight
        q, k = qk_norm_rope(q, k, *weights, *rope, eps=self.eps, across_heads=True)
        return self.to_out[0](attention(q, k, v).flatten(2))

    def over_text(self, h: Tensor, text_RSD: Tensor, rows: Tensor | None) -> Tensor:
        """Attention of visual tokens (B, L, D) over text (R, S, D), projected once per row."""
        q, k = self._heads(self.to_q(h)), self._heads(self.to_k(text_RSD))
        q = norm_rope(q, self.norm_q.weight, eps=self.eps, across_heads=True)
        k = norm_rope(k, self.norm_k.weight, eps=self.eps, across_heads=True)
        v = self._heads(self.to_v(text_RSD))
        k, v = take_rows(k, rows), take_rows(v, rows)
        return self.to_out[0](attention(q, k, v).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


def timestep_sinusoids(time: Tensor, size: int) -> Tensor:
    """Cosines, then sines (..., size) fp32 of times in Wan's scale, as diffusers rounds them."""
    half = size // 2
    index = torch.arange(half, dtype=torch.float32, device=time.device)
    frequencies = torch.exp(-math.log(10_000) * index / half)
    angles = time.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _published(
    repo: str, sample: SampleInfo, sampling: SamplingInfo, **options: Any
) -> PretrainedEntry:
    parts = {"codec": "wan_vae", "compression": (4, 8, 8)}
    return PretrainedEntry(
        repo=repo,
        license="Apache-2.0",
        source="Wan team, arXiv 2503.20314",
        text_encoder="umt5",
        text_tokens=512,
        sample=sample,
        sampling=sampling,
        **{**parts, **options},
    )


# What the authors sample with: their configs, and diffusers' page on Wan for the shift at 480p.
_480P = SampleInfo(frames=81, height=480, width=832, fps=16)
_720P = SampleInfo(frames=81, height=720, width=1280, fps=16)
_SAMPLING = SamplingInfo(
    num_steps=50, cfg_scale=5.0, timestep_shift=3.0, negative_prompt=NEGATIVE_PROMPT
)
_SAMPLING_720P = dataclasses.replace(_SAMPLING, timestep_shift=5.0)
_SAMPLING_A14B = dataclasses.replace(_SAMPLING, num_steps=40, cfg_scale=4.0, timestep_shift=12.0)
_BOUNDARY_A14B = 0.875


@MODELS.register(
    "wan2.1_t2v_1.3b",
    pretrained={"official": _published("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _480P, _SAMPLING)},
)
def wan21_t2v_1_3b() -> WanConfig:
    """Wan 2.1 text to video, 1.42 B parameters: 480p, 16 fps."""
    return WanConfig()


@MODELS.register(
    "wan2.1_t2v_14b",
    pretrained={"official": _published("Wan-AI/Wan2.1-T2V-14B-Diffusers", _720P, _SAMPLING_720P)},
)
def wan21_t2v_14b() -> WanConfig:
    """Wan 2.1 text to video, 14.3 B parameters: 480p and 720p, 16 fps."""
    return WanConfig(hidden_size=5120, depth=40, num_heads=40, mlp_size=13824)


@MODELS.register(
    "wan2.2_ti2v_5b",
    pretrained={
        "official": _published(
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            SampleInfo(frames=121, height=704, width=1280, fps=24),
            _SAMPLING_720P,
            codec="wan2.2_vae",
            compression=(4, 16, 16),
            note="text to video; a given first frame needs timesteps per token",
        )
    },
)
def wan22_ti2v_5b() -> WanConfig:
    """Wan 2.2 text (and image) to video, 5.00 B parameters: 720p, 24 fps, 16x16x4 VAE.

    One timestep for each sample is text to video; a timestep for each token, 0 at the tokens of
    a given first frame, is image to video.
    """
    return WanConfig(in_channels=48, hidden_size=3072, depth=30, num_heads=24, mlp_size=14336)


@MODELS.register(
    "wan2.2_t2v_a14b",
    pretrained={
        "high_noise": _published(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            _720P,
            _SAMPLING_A14B,
            lowest_t=_BOUNDARY_A14B,
            note="the expert for t from 0.875 to 1: the one that generates in one step",
        ),
        "low_noise": _published(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            _720P,
            dataclasses.replace(_SAMPLING_A14B, cfg_scale=3.0),
            subfolder="transformer_2",
            note="the expert for t below 0.875: it has never seen the pure noise of one step",
        ),
    },
)
def wan22_t2v_a14b() -> WanConfig:
    """Wan 2.2 text to video, 14.3 B parameters: the high-noise expert of two.

    Wan 2.2 A14B has an expert for t >= 0.875 and another below. One step starts at t = 1, so the
    generator is made from the high-noise expert alone, and an export holds no second transformer.
    As a teacher it is to be trusted for t >= 0.875 only.
    """
    return WanConfig(hidden_size=5120, depth=40, num_heads=40, mlp_size=13824)
