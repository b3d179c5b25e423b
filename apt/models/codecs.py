"""A lossless codec that folds pixels into channels, with the shapes of a video VAE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from apt.errors import ConfigError, InputError
from apt.models.architectures import CODECS
from apt.pixels import LatentCodec

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class PatchifyConfig:
    """Options of `PatchifyCodec`.

    Attributes:
        temporal: frames per latent frame.
        spatial: pixels per latent along height and width.
        lapped: blocks overlap their neighbours in height and width through an orthogonal
            transform, so errors fade out between blocks instead of showing seams.
        mean, std: statistics of the data set's pixels; latents are (pixels - mean) / std.
    """

    temporal: int = 4
    spatial: int = 8
    lapped: bool = False
    mean: float = 0.0
    std: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ConfigError(
                f"latents are (pixels - mean) / std, so mean {self.mean} must be finite, and std "
                f"{self.std} finite and above 0"
            )
        if self.lapped and self.spatial % 2:
            raise ConfigError(
                f"lapped blocks reach half a block into their neighbours, so spatial must be even, "
                f"got {self.spatial}; change it, or set lapped to False"
            )

    def build(self) -> PatchifyCodec:
        return PatchifyCodec(self)


class PatchifyCodec(LatentCodec):
    """Folds blocks of pixels into channels: lossless, with no weights.

    Like a causal video VAE, it takes k * temporal + 1 frames. The first frame has a latent frame of
    its own (it is repeated to fill the block, and decoding averages the copies), so an image is a
    video of one frame.
    """

    def __init__(self, config: PatchifyConfig) -> None:
        super().__init__()
        self.config = config
        self.temporal_compression = config.temporal
        self.spatial_compression = config.spatial
        self.channels = 3 * config.temporal * config.spatial**2

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, T, H, W) in [-1, 1] to latents (B, C, T', H', W')."""
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise InputError(f"pixels must be (B, 3, T, H, W), got {tuple(pixels.shape)}")
        self.latent_shape(*pixels.shape[2:])
        r, p = self.temporal_compression, self.spatial_compression
        values = (pixels - self.config.mean) / self.config.std
        if self.config.lapped:
            values = _transform(values, self._basis(values, -2), self._basis(values, -1))
        first = values[:, :, :1].expand(-1, -1, r - 1, -1, -1)
        blocks = torch.cat([first, values], dim=2)
        return rearrange(blocks, "b c (t r) (h p) (w q) -> b (c r p q) t h w", r=r, p=p, q=p)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, T', H', W') to pixels (B, 3, T, H, W), not clipped."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise InputError(
                f"latents must be (B, {self.channels}, T, H, W), got {tuple(latents.shape)}"
            )
        r, p = self.temporal_compression, self.spatial_compression
        blocks = rearrange(latents, "b (c r p q) t h w -> b c (t r) (h p) (w q)", r=r, p=p, q=p)
        first = blocks[:, :, :r].mean(dim=2, keepdim=True)
        values = torch.cat([first, blocks[:, :, r:]], dim=2)
        if self.config.lapped:
            values = _transform(values, self._basis(values, -2).mT, self._basis(values, -1).mT)
        return values * self.config.std + self.config.mean

    def _basis(self, values: Tensor, dim: int) -> Tensor:
        size = values.shape[dim]
        return lapped_basis(size, self.spatial_compression, values.dtype, values.device)


def _transform(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows @ values @ columns^T in the dtype of `values`, even inside autocast."""
    with torch.autocast(values.device.type, enabled=False):
        return rows @ values @ columns.mT


@lru_cache(maxsize=64)
def lapped_basis(
    size: int,
    block: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device = _CPU,
) -> Tensor:
    """Return an orthogonal (size, size) matrix; row b * block + k is frequency k of block b.

    This is the modified discrete cosine transform with a sine window (Malvar 1992): each block
    also covers half of both neighbours. The first and last block end at the border.

    Args:
        size: samples along the dimension, a multiple of `block`.
        block: samples per block, even.
        dtype, device: those of the result, which is computed in fp64 on the CPU. It is cached, to
            avoid a copy to the GPU for every clip; do not write to it.
    """
    half = block // 2
    # Later callers get the cached result, and may be in another mode or default device.
    with torch.inference_mode(False), _CPU:
        fold = torch.eye(size, dtype=torch.float64)
        for border in range(block, size, block):
            for i in range(half):
                before, after = border - 1 - i, border + i
                angle = math.pi / 4 * (1 - (2 * i + 1) / block)
                fold[before, before] = fold[after, after] = math.cos(angle)
                # DCT-IV cosines are even at a block's first border and odd at its last.
                fold[before, after] = -math.sin(angle)
                fold[after, before] = math.sin(angle)
        k = torch.arange(block, dtype=torch.float64) + 0.5
        cosines = (k[:, None] * k * (math.pi / block)).cos() * math.sqrt(2 / block)
        basis = torch.block_diag(*[cosines] * (size // block)) @ fold
        return basis.to(device=device, dtype=dtype)


@CODECS.register("patchify")
def patchify() -> PatchifyConfig:
    """Lossless: pixels folded into channels (for small videos)."""
    return PatchifyConfig()
