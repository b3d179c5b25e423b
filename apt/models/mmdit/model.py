"""MMDiT: the two-stream diffusion transformer of the paper (APT Sec. 3.1, Fig. 1), in our sizes.

Visual and text tokens have separate weights and attend jointly. The model uses RMSNorm, qk-RMSNorm,
3D rotary positions on the visual tokens, timestep modulation and GELU MLPs, and takes any (T, H, W)
that the patch size divides.

Shape suffixes: B samples, R rows of conditions, L visual tokens, S text tokens, D hidden size,
H heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from apt.condition import Condition, pooled_text, text_tokens
from apt.errors import ConfigError
from apt.flow import expand_timesteps
from apt.kernels import (
    StreamQKV,
    attention,
    joint_qk_norm_rope,
    modulated_norm,
    residual_modulated_norm,
)
from apt.kernels.modulated_norm import take_rows
from apt.models.architectures import MODELS
from apt.models.layers import keep_rows, rope_table
from apt.models.transformer import (
    Context,
    DiffusionTransformer,
    Tokens,
    TransformerBlock,
    check_rotary_heads,
    joint_mask,
    token_grid,
)

# A predicted sample is divided by at least this t: below it, 1 / t would only amplify errors.
_MIN_TIMESTEP = 0.05


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Shape of an `MMDiT`.

    Attributes:
        in_channels: latent channels C.
        hidden_size, depth, num_heads: D, number of blocks, attention heads.
        patch_size: latents per token along (T, H, W).
        text_dim: embedding dimension of the text encoder.
        pooled_dim: dimension of the text encoder's pooled vector, which is added to the timestep
            embedding (Esser et al. 2024); 0 does not use it.
        mlp_ratio: MLP width over D.
        num_dual_blocks: number of first blocks with separate weights for text; in later ones, text
            and visual tokens share their weights. None: all blocks.
        modulation: "shared": one embedding of the timestep for all blocks and a learned bias in
            each; "block": a linear layer in each block.
        prediction: output of the last layer: the velocity, or the clean sample, which is then
            converted to the velocity. "sample" is for pixel-like latents whose patches have more
            dimensions than D, too few to represent noise (arXiv 2511.13720).
        rope_theta: base of the rotary frequencies.
        absolute_positions: also add sinusoids of the position to the visual tokens, from which a
            small model on small videos learns positions sooner.
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
        check_rotary_heads(self.hidden_size, self.num_heads)
        if self.depth < 1:
            raise ConfigError(f"depth must be at least 1, got {self.depth}")

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return tokens along (T, H, W); InputError if they are not multiples of the patch size."""
        return token_grid(latent_shape, self.patch_size)

    def build(self) -> MMDiT:
        return MMDiT(self)


class MMDiT(DiffusionTransformer):
    """The two-stream transformer, with the interface of every `DiffusionTransformer`.

    With prediction "sample", velocities are fp32.
    """

    output_names = ("final_modulation", "patch_out")
    text_stream = "joint"
    config: MMDiTConfig

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        patch = config.in_channels * math.prod(config.patch_size)
        dual = config.depth if config.num_dual_blocks is None else config.num_dual_blocks

        self.patch_in = nn.Linear(patch, d)
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
        self.patch_out = nn.Linear(d, patch)
        self._init_weights()

    def embed(
        self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None
    ) -> tuple[Tokens, Context]:
        config, grid = self.config, self.token_grid(x.shape[2:])
        pt, ph, pw = config.patch_size
        patches = rearrange(x, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=pt, q=ph, r=pw)
        x_BLD = self.patch_in(patches)
        if config.absolute_positions:
            x_BLD = x_BLD + position_table(grid, config.hidden_size, x.device).to(x_BLD.dtype)
        y_RSD = self.text_in(text_tokens(c, config.text_dim).to(x_BLD.dtype))
        embedding = self.time_in(t, dtype=y_RSD.dtype)
        if config.pooled_dim:
            pooled = pooled_text(c, config.pooled_dim)
            embedding = embedding + self.pooled_in(pooled.to(embedding.dtype))
        modulation = F.silu(embedding)
        if config.modulation == "shared":
            modulation = self.time_modulation(modulation)
        head_dim = config.hidden_size // config.num_heads
        context = Context(
            embedding=embedding,
            modulation=modulation,
            rows=rows,
            rope=rope_table(grid, head_dim, config.rope_theta, x.device),
            mask=joint_mask(c, rows, x_BLD.shape[1]),
        )
        return Tokens(x_BLD, take_rows(y_RSD, rows)), context

    def unembed(self, h_BLD: Tensor, context: Context, x: Tensor, t: Tensor) -> Tensor:
        rows, (frames, height, width) = context.rows, self.token_grid(x.shape[2:])
        shift, scale = self.final_modulation(F.silu(context.embedding)).chunk(2, dim=-1)
        y = modulated_norm(h_BLD, scale, shift, rows=rows, eps=self.config.norm_eps)
        pt, ph, pw = self.config.patch_size
        out = rearrange(
            context.whole(self.patch_out(y)),
            "b (t h w) (c p q r) -> b c (t p) (h q) (w r)",
            t=frames, h=height, w=width, p=pt, q=ph, r=pw,
        )  # fmt: skip
        if self.config.prediction == "velocity":
            return out
        t_B = t if rows is None else t[rows]
        # In fp32, because the quotient is large for small t.
        return (x.float() - out.float()) / expand_timesteps(t_B.clamp_min(_MIN_TIMESTEP), x.float())

    def _init_weights(self) -> None:
        """Initialise linear layers with Xavier, but modulation and output with zeros.

        Blocks then start as identities (adaLN-zero).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        zeros = [self.final_modulation, self.patch_out]
        if self.config.modulation == "shared":
            zeros.append(self.time_modulation)
        else:
            zeros += [s.modulation for s in self.modules() if isinstance(s, Stream)]
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
        """Map (R, 6 D) shared modulation, or (R, D) activated embedding, to six (R, D)."""
        if hasattr(self, "modulation_bias"):
            table = embedding + self.modulation_bias
        else:
            table = self.modulation(embedding)
        return Modulation(*table.chunk(6, dim=-1))

    def project(
        self,
        x: Tensor,
        m: Modulation,
        rope: tuple[Tensor, Tensor] | tuple[None, None],
        rows: Tensor | None,
        *,
        queries: bool = True,
    ) -> StreamQKV:
        """Return projected q, k and v with their norms and rotation; queries are optional."""
        h = modulated_norm(x, m.scale1, m.shift1, rows=rows, eps=self.eps)
        parts = 3 if self.q_norm is not None else 2
        qkv = self.qkv(h).unflatten(-1, (parts, self.num_heads, -1))
        if queries:
            return StreamQKV(qkv, self.q_norm, self.k_norm, *rope)
        return StreamQKV(qkv[:, :, -2:], None, self.k_norm, *rope)

    def keep_keys_and_values(self) -> None:
        """Delete what only this stream's output needs."""
        self.qkv = keep_rows(self.qkv, slice(self.qkv.in_features, None))
        self.q_norm = self.out = self.mlp_in = self.mlp_out = None

    def finish(self, x: Tensor, attended: Tensor, m: Modulation, rows: Tensor | None) -> Tensor:
        """Apply the output projection, the gated residual, and the MLP."""
        assert self.out is not None and self.mlp_in is not None and self.mlp_out is not None
        x, h = residual_modulated_norm(
            x, self.out(attended), m.gate1, m.scale2, m.shift2, rows=rows, eps=self.eps
        )
        h = self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh"))
        return torch.addcmul(x, take_rows(m.gate2, rows)[:, None], h)


class MMDiTBlock(TransformerBlock):
    """Joint attention over both streams, then an MLP for each."""

    def __init__(self, config: MMDiTConfig, *, dual: bool) -> None:
        super().__init__()
        # One entry if text shares the visual weights, so that state dicts have them once.
        self.streams = nn.ModuleList(Stream(config) for _ in range(2 if dual else 1))
        self.text_output = True

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        x_BLD, y_BSD = tokens
        rows = context.rows
        visual, text = self.stream_list()[0], self.stream_list()[-1]
        m_x = visual.modulate(context.modulation)
        m_y = m_x if text is visual else text.modulate(context.modulation)
        streams = [
            visual.project(x_BLD, m_x, context.rope, rows),
            text.project(y_BSD, m_y, (None, None), rows, queries=self.text_output),
        ]
        q, k, v = joint_qk_norm_rope(streams, eps=visual.eps)
        queries = context.joint if self.text_output else context.visual
        attended = attention(
            q, k, v, mask=context.mask, queries=queries, keys=context.joint
        ).flatten(2)
        split = x_BLD.shape[1]
        x_BLD = visual.finish(x_BLD, attended[:, :split], m_x, rows)
        if self.text_output:
            y_BSD = text.finish(y_BSD, attended[:, split:], m_y, rows)
        return Tokens(x_BLD, y_BSD)

    def stream_list(self) -> list[Stream]:
        """Return the visual weights, and those of text if it has its own."""
        return cast("list[Stream]", list(self.streams))

    def drop_text_output(self) -> None:
        """Stop updating text after attention: nothing reads it after the last block."""
        if self.text_output and len(self.streams) == 2:
            self.stream_list()[1].keep_keys_and_values()
        self.text_output = False


class TimestepEmbedding(nn.Module):
    """A two-layer MLP on sinusoids of 1000 t: (R,) in [0, 1] to (R, D)."""

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
    """Return sinusoids (L, D) fp32 of absolute positions: those of `rope_table` with base 100."""
    cos, sin = rope_table(grid, size, 100.0, device)
    with torch.inference_mode(False):  # cached for later callers, as in `rope_table`
        return torch.cat([cos, sin], dim=-1)


# --- registered sizes ---------------------------------------------------------------------------


@MODELS.register("mmdit_digits")
def mmdit_digits() -> MMDiTConfig:
    """6 M parameters for the built-in moving digits (pixel patches)."""
    return MMDiTConfig(
        in_channels=768,
        hidden_size=256,
        depth=6,
        num_heads=4,
        # Each of the codec's blocks of pixels is a token.
        patch_size=(1, 1, 1),
        text_dim=128,
        pooled_dim=128,
        mlp_ratio=3.0,
        num_dual_blocks=1,
        prediction="sample",
        # On a grid of 3x4x4, the usual base would rotate nearly all pairs by less than a degree.
        rope_theta=10.0,
        absolute_positions=True,
    )


@MODELS.register("mmdit_digits_latent")
def mmdit_digits_latent() -> MMDiTConfig:
    """4 M parameters for the built-in moving digits in the latents of digits_ae."""
    return MMDiTConfig(
        in_channels=16,
        hidden_size=192,
        depth=6,
        num_heads=4,
        text_dim=128,
        pooled_dim=128,
        num_dual_blocks=1,
        rope_theta=10.0,  # as above: same grid
        absolute_positions=True,
    )


@MODELS.register("mmdit_tiny")
def mmdit_tiny() -> MMDiTConfig:
    """4 M parameters for small clips of your own, in latents, on a laptop."""
    return mmdit_digits_latent()


@MODELS.register("mmdit_mini")
def mmdit_mini() -> MMDiTConfig:
    """18 M parameters for clips of your own, in latents, on a workstation."""
    return dataclasses.replace(mmdit_tiny(), hidden_size=384, depth=8, num_heads=6)


@MODELS.register("mmdit_small")
def mmdit_small() -> MMDiTConfig:
    """0.3 B parameters for VAE latents, for experiments on one GPU."""
    return MMDiTConfig(hidden_size=1024, depth=12, num_heads=16, text_dim=4096)


@MODELS.register("apt_8b")
def apt_8b() -> MMDiTConfig:
    """8 B parameters: the shape of the paper's model (APT Sec. 3.1)."""
    return MMDiTConfig(hidden_size=3072, depth=36, num_heads=24, text_dim=4096)
