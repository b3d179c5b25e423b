"""A lossless codec: pixels folded into channels, in the shapes of a video VAE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from apt.errors import InputError
from apt.models.registry import CODECS


@dataclass(frozen=True, kw_only=True)
class PatchifyConfig:
    """Options of `PatchifyCodec`.

    Attributes:
        temporal: frames per latent frame.
        spatial: pixels per latent along height and width.
        mean, std: latent statistics of the data set; latents are (pixels - mean) / std.
    """

    temporal: int = 4
    spatial: int = 4
    mean: float = 0.0
    std: float = 0.5

    def build(self) -> PatchifyCodec:
        return PatchifyCodec(self)


class PatchifyCodec(nn.Module):
    """Fold blocks of pixels into channels; nothing is lost and nothing is learned.

    Like a causal video VAE it takes k * temporal + 1 frames: the first frame is one latent frame of
    its own (its repeats fill the block, and decoding averages them), so an image is a video of
    one frame.
    """

    def __init__(self, config: PatchifyConfig) -> None:
        super().__init__()
        self.config = config
        self.temporal_compression = config.temporal
        self.spatial_compression = config.spatial
        self.channels = 3 * config.temporal * config.spatial**2

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] to latents (B, C, T', H', W')."""
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise InputError(f"pixels must be (B, 3, T, H, W), got {tuple(pixels.shape)}")
        self.latent_shape(*pixels.shape[2:])
        r, p = self.temporal_compression, self.spatial_compression
        first = pixels[:, :, :1].expand(-1, -1, r - 1, -1, -1)
        blocks = torch.cat([first, pixels], dim=2)
        latents = rearrange(blocks, "b c (t r) (h p) (w q) -> b (c r p q) t h w", r=r, p=p, q=p)
        return (latents - self.config.mean) / self.config.std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, T', H', W') to pixels (B, 3, T, H, W), not clipped."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise InputError(
                f"latents must be (B, {self.channels}, T, H, W), got {tuple(latents.shape)}"
            )
        r, p = self.temporal_compression, self.spatial_compression
        values = latents * self.config.std + self.config.mean
        blocks = rearrange(values, "b (c r p q) t h w -> b c (t r) (h p) (w q)", r=r, p=p, q=p)
        first = blocks[:, :, :r].mean(dim=2, keepdim=True)
        return torch.cat([first, blocks[:, :, r:]], dim=2)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') for a clip; raises InputError with the nearest sizes that fit."""
        r, p = self.temporal_compression, self.spatial_compression
        if frames < 1 or (frames - 1) % r:
            low = max(frames - 1, 0) // r * r + 1
            raise InputError(f"{frames} frames do not fit; use {low} or {low + r} ({r}k + 1)")
        for name, size in (("height", height), ("width", width)):
            if size < p or size % p:
                raise InputError(
                    f"{name} {size} does not fit; use a multiple of {p}, such as "
                    f"{max(size // p, 1) * p}"
                )
        return (frames - 1) // r + 1, height // p, width // p


@CODECS.register("patchify")
def patchify() -> PatchifyConfig:
    """Lossless: pixels folded into channels (for small videos)."""
    return PatchifyConfig()
