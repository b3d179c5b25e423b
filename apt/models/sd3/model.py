"""SD3: the two-stream transformer of Stable Diffusion 3 and 3.5 (arXiv 2403.03206).

Image and text tokens have separate weights and attend jointly. The model uses LayerNorm, optional
qk-RMSNorm, sinusoidal positions cropped from the middle of one table, and modulation by timestep
and pooled text. In 3.5 medium some blocks also attend among image tokens only. Parameters are named
as in diffusers' `SD3Transformer2DModel`.

Shape suffixes: B samples, R rows of conditions, L image tokens, S text tokens, D hidden size,
H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from apt.condition import Condition, pooled_text, text_tokens
from apt.distributed.sequence import TokenSplit
from apt.errors import ConfigError, InputError
from apt.flow import FlowAdapter
from apt.kernels import attention, modulated_norm, qk_norm_rope, residual_modulated_norm
from apt.kernels.modulated_norm import take_rows
from apt.models.layers import FeedForward, keep_rows, timestep_sinusoids
from apt.models.transformer import (
    Context,
    DiffusionTransformer,
    Tokens,
    TransformerBlock,
    joint_mask,
    token_grid,
)

FLOW = FlowAdapter(time_scale=1000.0)
"""SD3's time is 1000 t, and its velocity is ours."""

_EPS = 1e-6  # of every norm
_TIME_DIM = 256


@dataclass(frozen=True, kw_only=True)
class SD3Config:
    """Shape of an `SD3`.

    Attributes:
        in_channels: latent channels C.
        depth, num_heads, head_dim: blocks, attention heads, channels per head; D is the product of
            the last two.
        patch_size: latents per token along height and width.
        text_dim: dimension of the text tokens: T5's, to which CLIP's are padded.
        pooled_dim: dimension of the pooled text: that of both CLIPs together.
        dual_attention_layers: blocks, counted from 0, with a second attention over image tokens.
        qk_norm: whether queries and keys are RMS-normalised per head (3.5 but not 3).
        max_positions: tokens along a side of the position table; larger latents are rejected.
        sample_size: latents along a side of the images in the first training stage. The table's
            coordinates run from 0 to sample_size / patch_size for any table size.
    """

    in_channels: int = 16
    depth: int = 24
    num_heads: int = 24
    head_dim: int = 64
    patch_size: int = 2
    text_dim: int = 4096
    pooled_dim: int = 2048
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: bool = True
    max_positions: int = 192
    sample_size: int = 128

    def __post_init__(self) -> None:
        for name in (
            "in_channels", "depth", "num_heads", "head_dim", "patch_size", "text_dim", "pooled_dim",
            "max_positions", "sample_size",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % 4:
            raise ConfigError(
                f"the hidden size, {self.num_heads} heads x {self.head_dim}, must be a multiple of "
                "4, for sine and cosine of two coordinates; change num_heads or head_dim"
            )
        if self.qk_norm and self.head_dim % 2:
            raise ConfigError(f"head_dim must be even with qk_norm, got {self.head_dim}")
        layers = self.dual_attention_layers
        if list(layers) != sorted(set(layers)) or not set(layers) <= set(range(self.depth)):
            raise ConfigError(
                "dual_attention_layers must be in increasing order and in "
                f"0..{self.depth - 1}, got {layers}"
            )

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.num_heads * self.head_dim

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return tokens along (T, H, W); raises InputError for latents that do not fit."""
        frames, *sides = latent_shape
        if frames != 1:
            raise InputError(
                f"Stable Diffusion 3 makes images: latents must be (B, C, 1, H, W), got {frames} "
                "frames; choose a video model, or use images"
            )
        patch, most = self.patch_size, self.max_positions
        grid = token_grid(latent_shape, (1, patch, patch))
        if max(grid) > most:
            raise InputError(
                f"latents {tuple(sides)} have {grid[1:]} tokens along height and width, but this "
                f"model accepts at most {most} along each, {patch * most} latents; choose a "
                "smaller size"
            )
        return grid

    def build(self) -> SD3:
        return SD3(self)


class SD3(DiffusionTransformer):
    """Stable Diffusion's transformer, with the interface of every `DiffusionTransformer`.

    Latents are those of images, (B, C, 1, H, W), and text needs pooled vectors. Stable Diffusion
    also attends to padding, so its own text encoder returns no mask; a mask from another encoder is
    applied.
    """

    blocks_name = "transformer_blocks"
    output_names = ("norm_out", "proj_out")
    text_stream = "joint"
    config: SD3Config

    def __init__(self, config: SD3Config) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbedding(config)
        self.context_embedder = nn.Linear(config.text_dim, d)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config, dual=i in config.dual_attention_layers, last=i == config.depth - 1)
            for i in range(config.depth)
        )
        self.norm_out = Modulation(d, 2)
        self.proj_out = nn.Linear(d, config.patch_size**2 * config.in_channels)
        self._init_weights()

    def embed(
        self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None
    ) -> tuple[Tokens, Context]:
        text, pooled = text_tokens(c, self.config.text_dim), pooled_text(c, self.config.pooled_dim)
        x_BLD = self.pos_embed(x[:, :, 0])
        y_RSD = self.context_embedder(text.to(x_BLD.dtype))
        # Every block starts by activating the same embedding; do it once.
        embedding = F.silu(self.time_text_embed(t, pooled.to(y_RSD.dtype)))
        mask = joint_mask(c, rows, x_BLD.shape[1])
        context = Context(embedding=embedding, modulation=embedding, rows=rows, mask=mask)
        return Tokens(x_BLD, take_rows(y_RSD, rows)), context

    def unembed(self, h_BLD: Tensor, context: Context, x: Tensor, t: Tensor) -> Tensor:
        _, height, width = self.token_grid(x.shape[2:])
        scale, shift = self.norm_out(context.embedding)
        y = modulated_norm(h_BLD, scale, shift, norm="layer", eps=_EPS, rows=context.rows)
        p = self.config.patch_size
        out = rearrange(
            context.whole(self.proj_out(y)),
            "b (h w) (p q c) -> b c 1 (h p) (w q)",
            h=height, w=width, p=p, q=p,
        )  # fmt: skip
        return FLOW.velocity(out)

    def _init_weights(self) -> None:
        """Initialise linear layers with Xavier, but modulation and output with zeros.

        Blocks then start as identities (adaLN-zero).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out.weight)


class PatchEmbed(nn.Module):
    """Embeds patches and adds positions: (B, C, H, W) to (B, L, D)."""

    pos_embed: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.max_positions = config.max_positions
        self.proj = nn.Conv2d(
            config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        # Published checkpoints contain the table, so it is part of the state here too.
        self.register_buffer("pos_embed", position_table(config))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x)
        height, width = tokens.shape[2:]
        # Use the middle of the table: images of all sizes share their centre.
        top, left = (self.max_positions - height) // 2, (self.max_positions - width) // 2
        table = self.pos_embed.view(self.max_positions, self.max_positions, -1)
        positions = table[top : top + height, left : left + width].flatten(0, 1)
        return (rearrange(tokens, "b d h w -> b (h w) d") + positions).to(tokens.dtype)


def position_table(config: SD3Config) -> Tensor:
    """Return sinusoids (1, N^2, D) fp32 of N x N positions: the column's half, then the row's."""
    n, quarter = config.max_positions, config.hidden_size // 4
    # fp32 coordinates and fp64 angles, as in the published tables
    places = torch.arange(n, dtype=torch.float32) / (n / (config.sample_size // config.patch_size))
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = places.double()[:, None] * frequencies
    side = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    columns, rows = side[None, :].expand(n, n, -1), side[:, None].expand(n, n, -1)
    return torch.cat([columns, rows], dim=2).view(1, n * n, config.hidden_size)


class TimeTextEmbedding(nn.Module):
    """Embeds timesteps (R,) in [0, 1] and pooled text (R, P) as (R, D)."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.timestep_embedder = Perceptron(_TIME_DIM, config.hidden_size)
        self.text_embedder = Perceptron(config.pooled_dim, config.hidden_size)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        sinusoids = timestep_sinusoids(FLOW.time(t), _TIME_DIM).to(pooled.dtype)
        return self.timestep_embedder(sinusoids) + self.text_embedder(pooled)


class Perceptron(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Modulation(nn.Module):
    """Maps the activated embedding (R, D) to `number` shifts, scales and gates (R, D)."""

    def __init__(self, hidden_size: int, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, number * hidden_size)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(embedding).split(embedding.shape[1], dim=1)


class Attention(nn.Module):
    """The projections that image tokens have in every attention."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d) for _ in range(3))
        self.norm_q, self.norm_k = head_norm(config), head_norm(config)
        self.to_out = nn.ModuleList([nn.Linear(d, d)])

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised q and k, and v, each (B, L, H, Dh)."""
        q, k, v = (self._heads(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return *normalize(q, k, self.norm_q, self.norm_k), v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class ImageAttention(Attention):
    """Attention among image tokens."""

    def forward(self, x: Tensor, split: TokenSplit | None) -> Tensor:
        """Map (B, L, D) to (B, L, D), or this rank's part of it."""
        attended = attention(*self.project(x), queries=split, keys=split)
        return self.to_out[0](attended.flatten(2))


class JointAttention(Attention):
    """Attention among image and text tokens, with separate weights.

    Without `text_output`, text is only read. Its query weights are then unused, but published
    checkpoints contain them.
    """

    def __init__(self, config: SD3Config, *, text_output: bool) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.add_q_proj: nn.Linear | None = nn.Linear(d, d)
        self.add_k_proj, self.add_v_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.norm_added_q, self.norm_added_k = head_norm(config), head_norm(config)
        self.to_add_out = nn.Linear(d, d) if text_output else None
        if not text_output:
            for unused in (self.add_q_proj, self.norm_added_q):
                if unused is not None:
                    unused.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Return updates of image (B, L, D) and text (B, S, D); None for text without output."""
        mask, joint = context.mask, context.joint
        q_x, k_x, v_x = self.project(x)
        k_y, v_y = self._heads(self.add_k_proj(y)), self._heads(self.add_v_proj(y))
        if self.to_add_out is None or self.add_q_proj is None:
            _, k_y = normalize(k_y, k_y, self.norm_added_k, self.norm_added_k)
            k, v = torch.cat([k_x, k_y], dim=1), torch.cat([v_x, v_y], dim=1)
            attended = attention(q_x, k, v, mask=mask, queries=context.visual, keys=joint)
            return self.to_out[0](attended.flatten(2)), None
        q_y = self._heads(self.add_q_proj(y))
        q_y, k_y = normalize(q_y, k_y, self.norm_added_q, self.norm_added_k)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q_x, q_y), (k_x, k_y), (v_x, v_y)))
        attended = attention(q, k, v, mask=mask, queries=joint, keys=joint).flatten(2)
        split = x.shape[1]
        return self.to_out[0](attended[:, :split]), self.to_add_out(attended[:, split:])

    def drop_text_output(self) -> None:
        """Delete weights that only the text output needs."""
        self.add_q_proj = self.norm_added_q = self.to_add_out = None


def head_norm(config: SD3Config) -> nn.RMSNorm | None:
    """Return the norm of queries or keys, if the model has one; `normalize` computes it."""
    return nn.RMSNorm(config.head_dim, eps=_EPS) if config.qk_norm else None


def normalize(
    q: Tensor, k: Tensor, norm_q: nn.RMSNorm | None, norm_k: nn.RMSNorm | None
) -> tuple[Tensor, Tensor]:
    """Return q and k (B, L, H, Dh), RMS-normalised per head if there are norms."""
    if norm_q is None or norm_k is None:
        return q, k
    return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, eps=_EPS)


class JointBlock(TransformerBlock):
    """Joint attention, attention among image tokens if `dual`, then an MLP for each stream.

    In the `last` block text is only read.
    """

    def __init__(self, config: SD3Config, *, dual: bool, last: bool) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm1 = Modulation(d, 9 if dual else 6)
        self.norm1_context = Modulation(d, 2 if last else 6)
        self.attn = JointAttention(config, text_output=not last)
        self.attn2 = ImageAttention(config) if dual else None
        self.ff = FeedForward(d, 4 * d)
        self.ff_context = None if last else FeedForward(d, 4 * d)

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        x_BLD, y_BSD = tokens
        rows = context.rows
        shift1, scale1, gate1, shift2, scale2, gate2, *dual = self.norm1(context.modulation)
        text = self.norm1_context(context.modulation)
        # A text stream without output has scale first, as the final norm in published weights.
        shift_y, scale_y = (text[1], text[0]) if self.ff_context is None else text[:2]
        h = modulated_norm(x_BLD, scale1, shift1, norm="layer", eps=_EPS, rows=rows)
        h_y = modulated_norm(y_BSD, scale_y, shift_y, norm="layer", eps=_EPS, rows=rows)
        update, update_y = self.attn(h, h_y, context)
        if self.attn2 is not None:
            shift, scale, gate = dual
            h = modulated_norm(x_BLD, scale, shift, norm="layer", eps=_EPS, rows=rows)
            x_BLD = torch.addcmul(x_BLD, take_rows(gate1, rows)[:, None], update)
            update, gate1 = self.attn2(h, context.visual), gate
        x_BLD = finish(x_BLD, update, (gate1, shift2, scale2, gate2), self.ff, rows)
        if self.ff_context is not None and update_y is not None:
            y_BSD = finish(y_BSD, update_y, text[2:], self.ff_context, rows)
        return Tokens(x_BLD, y_BSD)

    def drop_text_output(self) -> None:
        """Delete weights that only the text output needs: the block becomes like the last one."""
        self.attn.drop_text_output()
        if self.ff_context is None:
            return
        self.ff_context = None
        old = self.norm1_context.linear
        shift, scale = slice(None, old.in_features), slice(old.in_features, 2 * old.in_features)
        self.norm1_context.linear = keep_rows(old, scale, shift)


def finish(
    x: Tensor,
    update: Tensor,
    modulation: Sequence[Tensor],
    ff: FeedForward,
    rows: Tensor | None,
) -> Tensor:
    """Apply the gated residual of attention's update (B, L, D), then the gated MLP."""
    gate1, shift, scale, gate2 = modulation
    x, h = residual_modulated_norm(
        x, update, gate1, scale, shift, norm="layer", eps=_EPS, rows=rows
    )
    return torch.addcmul(x, take_rows(gate2, rows)[:, None], ff(h))
