"""MMDiT: the two-stream diffusion transformer of the paper (APT Sec. 3.1, Fig. 1).

Visual and text tokens have weights of their own and attend jointly; RMSNorm, qk-RMSNorm, 3D rotary
positions on the visual tokens, timestep modulation, GELU MLP, any (T, H, W).

Shape suffixes: B samples, R rows of conditions, L visual tokens, S text tokens, D hidden size,
H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt.errors import ConfigError, InputError
from apt.flow import expand_timesteps
from apt.kernels import (
    StreamQKV,
    attention,
    joint_qk_norm_rope,
    modulated_norm,
    residual_modulated_norm,
)
from apt.kernels.rows import take_rows
from apt.models.conditions import TextCondition
from apt.models.registry import MODELS
from apt.models.tokens import check_layers, check_rows, rope_table, token_grid

# Below this noise level a predicted sample is not divided further: 1 / t would only amplify errors.
_MIN_TIMESTEP = 0.05


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Shape of an `MMDiT`.

    Attributes:
        in_channels: latent channels C.
        hidden_size, depth, num_heads: D, number of blocks, attention heads.
        patch_size: latents per token along (T, H, W).
        text_dim: embedding dimension of the text encoder.
        pooled_dim: dimension of the text encoder's pooled vector, which then joins the timestep in
            the modulation (Esser et al. 2024); 0 does not use it.
        mlp_ratio: MLP width over D.
        num_dual_blocks: blocks, counted from the first, with separate weights for text; later ones
            share one set. None: all.
        modulation: "shared": one embedding of the timestep for all blocks and a learned bias in
            each; "block": a linear layer in each block.
        prediction: what the last layer emits: the velocity, or the clean sample, which is then
            converted to the velocity. "sample" is for pixel-like latents whose patches have more
            dimensions than D, through which no noise fits (arXiv 2511.13720).
        rope_theta: base of the rotary frequencies.
        absolute_positions: also add sinusoids of the position to the visual tokens. A small model
            on small videos learns sooner where things are.
        norm_eps: epsilon of all RMSNorms.
    """

    in_channels: int = 16
    hidden_size: int = 512
    depth: int = 8
    num_heads: int = 8
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 128
    pooled_dim: int = 0
    mlp_ratio: float = 4.0
    num_dual_blocks: int | None = None
    modulation: Literal["shared", "block"] = "shared"
    prediction: Literal["velocity", "sample"] = "velocity"
    rope_theta: float = 10_000.0
    absolute_positions: bool = False
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

    def token_grid(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along (T, H, W); raises InputError if the patch size does not divide."""
        return token_grid(latent_shape, self.patch_size)

    def build(self) -> MMDiT:
        return MMDiT(self)


class MMDiT(nn.Module):
    """A velocity network over latents (B, C, T, H, W); see `apt.models.protocols.Backbone`."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = d = config.hidden_size
        self.depth = config.depth
        self.in_channels = config.in_channels
        self.checkpointing = False
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        dual = config.depth if config.num_dual_blocks is None else config.num_dual_blocks

        self.patch_in = nn.Linear(config.in_channels * patch, d)
        self.text_in = nn.Linear(config.text_dim, d)
        self.time_in = TimestepEmbedding(d)
        if config.pooled_dim:
            self.pooled_in = nn.Sequential(
                nn.Linear(config.pooled_dim, d), nn.SiLU(), nn.Linear(d, d)
            )
        if config.modulation == "shared":
            self.time_modulation = nn.Linear(d, 6 * d)
        self.blocks = nn.ModuleList(MMDiTBlock(config, dual=i < dual) for i in range(config.depth))
        self.block_list()[-1].drop_text_output()
        self.final_modulation = nn.Linear(d, 2 * d)
        self.patch_out = nn.Linear(d, config.in_channels * patch)
        self._init_weights()

    def forward(
        self, x: Tensor, t: Tensor, c: TextCondition, *, rows: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, T, H, W).

        Args:
            x: latents (B, C, T, H, W).
            t: timesteps (R,) in [0, 1].
            c: R rows of text.
            rows: (B,) int64, the row of `t` and `c` for each sample; None if R = B.

        Raises:
            InputError: for latents that the patch size does not divide, or rows that do not match.
        """
        grid = self.token_grid(tuple(x.shape[2:]))
        h_BLD, embedding = self._run(x, t, c, rows, layers=(self.depth,))
        shift, scale = self.final_modulation(F.silu(embedding)).chunk(2, dim=-1)
        y = modulated_norm(h_BLD[0], scale, shift, rows=rows, eps=self.config.norm_eps)
        pt, ph, pw = self.config.patch_size
        out = rearrange(
            self.patch_out(y),
            "b (t h w) (c p q r) -> b c (t p) (h q) (w r)",
            t=grid[0], h=grid[1], w=grid[2], p=pt, q=ph, r=pw,
        )  # fmt: skip
        if self.config.prediction == "velocity":
            return out
        t_B = t if rows is None else t[rows]
        # fp32: the quotient is large for small t.
        return (x.float() - out.float()) / expand_timesteps(t_B.clamp_min(_MIN_TIMESTEP), x.float())

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

    def block_list(self) -> list[MMDiTBlock]:
        """The transformer blocks in order."""
        return cast("list[MMDiTBlock]", list(self.blocks))

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass."""
        self.checkpointing = enabled

    def keep_hidden_states(self, last_layer: int) -> None:
        """Delete the blocks after `last_layer`, its unused text output, and the output layers."""
        del self.blocks[last_layer:]
        self.depth = last_layer
        self.block_list()[-1].drop_text_output()
        del self.final_modulation, self.patch_out

    def _run(
        self,
        x: Tensor,
        t: Tensor,
        c: TextCondition,
        rows: Tensor | None,
        layers: Sequence[int],
    ) -> tuple[list[Tensor], Tensor]:
        """Hidden tokens after `layers` and the timestep embedding (R, D)."""
        check_layers(layers, self.depth)
        check_rows(x, t, c, rows)
        grid = self.token_grid(tuple(x.shape[2:]))
        pt, ph, pw = self.config.patch_size
        patches = rearrange(x, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=pt, q=ph, r=pw)
        x_BLD = self.patch_in(patches)
        if self.config.absolute_positions:
            x_BLD = x_BLD + position_table(grid, self.hidden_size, x.device).to(x_BLD.dtype)
        y_RSD = self.text_in(c.tokens.to(x_BLD.dtype))
        y_BSD = take_rows(y_RSD, rows)
        mask = c.mask if c.mask is None or rows is None else c.mask[rows]
        if mask is not None:
            mask = torch.cat([mask.new_ones(x_BLD.shape[:2]), mask], dim=1)
        embedding = self.time_in(t, dtype=y_RSD.dtype)
        if self.config.pooled_dim:
            if c.pooled is None or c.pooled.shape[1:] != (self.config.pooled_dim,):
                given = "none" if c.pooled is None else tuple(c.pooled.shape)
                raise InputError(
                    "this model needs a text encoder that gives a pooled vector of "
                    f"{self.config.pooled_dim} dimensions, got {given}; change one of them, or set "
                    "pooled_dim=0"
                )
            embedding = embedding + self.pooled_in(c.pooled.to(embedding.dtype))
        shared = self.config.modulation == "shared"
        modulation = self.time_modulation(F.silu(embedding)) if shared else F.silu(embedding)
        head_dim = self.hidden_size // self.config.num_heads
        rope = rope_table(grid, head_dim, self.config.rope_theta, x.device)

        collected: dict[int, Tensor] = {}
        for number, block in enumerate(self.block_list()[: max(layers)], start=1):
            inputs = (x_BLD, y_BSD, modulation, rope, mask, rows)
            if self.checkpointing and torch.is_grad_enabled():
                x_BLD, y_BSD = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BLD, y_BSD = block(*inputs)
            collected[number] = x_BLD
        return [collected[layer] for layer in layers], embedding

    def _init_weights(self) -> None:
        """Xavier for linear layers; modulation and output start at zero, so blocks start as
        identities (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        zeros = [self.final_modulation, self.patch_out]
        if self.config.modulation == "shared":
            zeros.append(self.time_modulation)
        else:
            zeros += [s.modulation for block in self.block_list() for s in block.stream_list()]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class Modulation(NamedTuple):
    """Shift, scale and gate (R, D) of the two halves of a block."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class Stream(nn.Module):
    """One modality's weights in a block."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.eps = config.norm_eps
        width = int(d * config.mlp_ratio)
        if config.modulation == "shared":
            self.modulation_bias = nn.Parameter(torch.zeros(6 * d))
        else:
            self.modulation = nn.Linear(d, 6 * d)
        self.qkv = nn.Linear(d, 3 * d)
        self.q_norm: nn.Parameter | None = nn.Parameter(torch.ones(d // config.num_heads))
        self.k_norm = nn.Parameter(torch.ones(d // config.num_heads))
        self.out: nn.Linear | None = nn.Linear(d, d)
        self.mlp_in: nn.Linear | None = nn.Linear(d, width)
        self.mlp_out: nn.Linear | None = nn.Linear(width, d)

    def modulate(self, embedding: Tensor) -> Modulation:
        """(R, 6 D) shared modulation, or (R, D) activated embedding, to six (R, D)."""
        if hasattr(self, "modulation_bias"):
            table = embedding + self.modulation_bias
        else:
            table = self.modulation(embedding)
        return Modulation(*table.chunk(6, dim=-1))

    def project(
        self,
        x: Tensor,
        m: Modulation,
        rope: tuple[Tensor, Tensor] | None,
        rows: Tensor | None,
        *,
        queries: bool = True,
    ) -> StreamQKV:
        """q, k and v as projected, and their norms and rotation; a stream may ask nothing."""
        h = modulated_norm(x, m.scale1, m.shift1, rows=rows, eps=self.eps)
        parts = 3 if self.q_norm is not None else 2
        qkv = self.qkv(h).unflatten(-1, (parts, self.num_heads, -1))
        cos, sin = rope if rope is not None else (None, None)
        if queries:
            return StreamQKV(qkv, self.q_norm, self.k_norm, cos, sin)
        return StreamQKV(qkv[:, :, -2:], None, self.k_norm, cos, sin)

    @torch.no_grad()
    def keep_keys_and_values(self) -> None:
        """Delete what only this stream's own output needs."""
        old = self.qkv
        d = old.in_features
        self.qkv = nn.Linear(d, 2 * d, device=old.weight.device, dtype=old.weight.dtype)
        self.qkv.weight.copy_(old.weight[d:])
        self.qkv.bias.copy_(old.bias[d:])
        self.q_norm = self.out = self.mlp_in = self.mlp_out = None

    def finish(self, x: Tensor, attended: Tensor, m: Modulation, rows: Tensor | None) -> Tensor:
        """Output projection, gated residual, and the MLP."""
        assert self.out is not None and self.mlp_in is not None and self.mlp_out is not None
        x, h = residual_modulated_norm(
            x, self.out(attended), m.gate1, m.scale2, m.shift2, rows=rows, eps=self.eps
        )
        h = self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh"))
        return torch.addcmul(x, take_rows(m.gate2, rows)[:, None], h)


class MMDiTBlock(nn.Module):
    """Joint attention over both streams, then an MLP for each."""

    def __init__(self, config: MMDiTConfig, *, dual: bool) -> None:
        super().__init__()
        # One entry when text shares the visual weights: state dicts then hold them once.
        self.streams = nn.ModuleList(Stream(config) for _ in range(2 if dual else 1))
        self.text_output = True

    def forward(
        self,
        x_BLD: Tensor,
        y_BSD: Tensor,
        embedding: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens (B, L, D) and text tokens (B, S, D) after the block."""
        visual, text = self.stream_list()[0], self.stream_list()[-1]
        m_x = visual.modulate(embedding)
        m_y = m_x if text is visual else text.modulate(embedding)
        streams = [
            visual.project(x_BLD, m_x, rope, rows),
            text.project(y_BSD, m_y, None, rows, queries=self.text_output),
        ]
        q, k, v = joint_qk_norm_rope(streams, eps=visual.eps)
        attended = attention(q, k, v, mask=mask).flatten(2)
        split = x_BLD.shape[1]
        x_BLD = visual.finish(x_BLD, attended[:, :split], m_x, rows)
        if self.text_output:
            y_BSD = text.finish(y_BSD, attended[:, split:], m_y, rows)
        return x_BLD, y_BSD

    def stream_list(self) -> list[Stream]:
        """Visual weights, and those of text if it has its own."""
        return cast("list[Stream]", list(self.streams))

    def drop_text_output(self) -> None:
        """Stop updating text after attention: nothing reads it behind the last block."""
        if self.text_output and len(self.streams) == 2:
            self.stream_list()[1].keep_keys_and_values()
        self.text_output = False


class TimestepEmbedding(nn.Module):
    """Sinusoids of 1000 t through a two-layer MLP: (R,) in [0, 1] to (R, D)."""

    def __init__(self, hidden_size: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.linear1 = nn.Linear(2 * num_frequencies, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor, *, dtype: torch.dtype) -> Tensor:
        index = torch.arange(self.num_frequencies, dtype=torch.float32, device=t.device)
        frequencies = 10_000.0 ** (-index / self.num_frequencies)
        angles = 1000.0 * t.float()[:, None] * frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear2(F.silu(self.linear1(embedding)))


@lru_cache(maxsize=64)
def position_table(grid: tuple[int, int, int], size: int, device: torch.device) -> Tensor:
    """Sinusoids (L, D) fp32 of absolute positions: the angles of `rope_table` with base 100."""
    cos, sin = rope_table(grid, size, 100.0, device)
    return torch.cat([cos, sin], dim=-1)


@MODELS.register("mmdit_digits")
def mmdit_digits() -> MMDiTConfig:
    """6 M parameters for the built-in moving digits (pixel patches)."""
    return MMDiTConfig(
        in_channels=768,
        hidden_size=256,
        depth=6,
        num_heads=4,
        # The codec's blocks of pixels are the tokens.
        patch_size=(1, 1, 1),
        text_dim=128,
        pooled_dim=128,
        mlp_ratio=3.0,
        num_dual_blocks=1,
        prediction="sample",
        # The grid is 3x4x4: with the usual base nearly all pairs would turn by less than a degree.
        rope_theta=10.0,
        absolute_positions=True,
    )


@MODELS.register("mmdit_small")
def mmdit_small() -> MMDiTConfig:
    """0.3 B parameters for VAE latents: experiments on one GPU."""
    return MMDiTConfig(hidden_size=1024, depth=12, num_heads=16, text_dim=4096)


@MODELS.register("apt_8b")
def apt_8b() -> MMDiTConfig:
    """8 B parameters: the shape of the paper's model (APT Sec. 3.1)."""
    return MMDiTConfig(hidden_size=3072, depth=36, num_heads=24, text_dim=4096)
