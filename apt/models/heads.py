"""Discriminator heads: visual tokens of one block to one feature vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from apt.errors import ConfigError
from apt.kernels import attention
from apt.models.registry import HEADS

_HEAD_DIM = 64


@HEADS.register("attention")
class AttentionHead(nn.Module):
    """Cross-attention-only block: one learnable query attends to all visual tokens.

    APT Sec. 3.3. Tokens (B, L, D) to features (B, D).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_heads = max(1, hidden_size // _HEAD_DIM)
        if hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden size {hidden_size} does not split into {self.num_heads} heads"
            )
        self.query = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.to_query = nn.Linear(hidden_size, hidden_size)
        self.to_key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Features (B, D) of tokens (B, L, D); attention does not need the grid."""
        query = self.query.expand(tokens.shape[0], 1, -1)
        q = self.to_query(query).unflatten(-1, (self.num_heads, -1))
        key_value = self.to_key_value(self.norm(tokens)).unflatten(-1, (2, self.num_heads, -1))
        k, v = key_value.unbind(dim=2)
        return (query + self.out(attention(q, k, v).flatten(2)))[:, 0]


@HEADS.register("conv3d")
class Conv3DHead(nn.Module):
    """Tokens back on their (T, H, W) grid, two 3D convolutions, and the mean over positions.

    Judges local patches where the attention head judges the whole. Tokens (B, L, D) to (B, D).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = max(hidden_size // 4, 1)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.reduce = nn.Linear(hidden_size, width)
        self.conv = nn.Conv3d(width, width, kernel_size=3, padding=1)
        self.out = nn.Linear(width, hidden_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Features (B, D) of tokens (B, L, D) with L = T H W."""
        t, h, w = grid
        volume = rearrange(
            self.reduce(self.norm(tokens)), "b (t h w) d -> b d t h w", t=t, h=h, w=w
        )
        hidden = F.silu(volume + self.conv(F.silu(volume)))
        return self.out(hidden.mean(dim=(2, 3, 4)))
