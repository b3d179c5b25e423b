"""Discriminator heads: visual tokens of one block to one feature vector.

Tokens come in the backbone's type; a head computes, and answers, in that of its own weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from apt.distributed.sequence import SequenceGroup
from apt.errors import ConfigError
from apt.kernels import query_pooling
from apt.models.architectures import HEADS

_HEAD_DIM = 64
_NORM_EPS = 1e-6


@HEADS.register("attention")
class AttentionHead(nn.Module):
    """Cross-attention-only block: one learnable query attends to all visual tokens.

    APT Sec. 3.3. Tokens (B, L, D) to features (B, D). The keys have no bias: softmax takes no
    notice of what is added to all of them, so it would never train.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_heads = max(1, hidden_size // _HEAD_DIM)
        if hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden size {hidden_size} does not split into {self.num_heads} heads"
            )
        self.query = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5)
        self.norm = nn.RMSNorm(hidden_size, eps=_NORM_EPS)
        self.to_query = nn.Linear(hidden_size, hidden_size)
        self.to_key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_value = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, int, int],
        sequence: SequenceGroup | None = None,
    ) -> Tensor:
        """Features (B, D) of tokens (B, L, D); attention does not need the grid.

        With `sequence`, tokens are this rank's, and the features those of all ranks' tokens.
        """
        attended = query_pooling(
            tokens,
            self.to_query(self.query),
            self.to_key.weight,
            self.to_value.weight,
            self.to_value.bias,
            num_heads=self.num_heads,
            norm_weight=self.norm.weight,
            eps=_NORM_EPS,
            out_dtype=self.query.dtype,
            sequence=sequence,
        )
        return self.query + self.out(attended)


@HEADS.register("conv3d")
class Conv3DHead(nn.Module):
    """Tokens back on their (T, H, W) grid, two 3D convolutions, and the mean over positions.

    Sees local patches where the attention head sees the whole. Tokens (B, L, D) to (B, D).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = max(hidden_size // 4, 1)
        self.norm = nn.RMSNorm(hidden_size, eps=_NORM_EPS)
        self.reduce = nn.Linear(hidden_size, width)
        self.conv = nn.Conv3d(width, width, kernel_size=3, padding=1)
        self.out = nn.Linear(width, hidden_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Features (B, D) of tokens (B, L, D) with L = T H W."""
        t, h, w = grid
        tokens = self.norm(tokens.to(self.norm.weight.dtype))
        volume = rearrange(self.reduce(tokens), "b (t h w) d -> b d t h w", t=t, h=h, w=w)
        hidden = F.silu(volume + self.conv(F.silu(volume)))
        return self.out(hidden.mean(dim=(2, 3, 4)))
