"""The sizes that ops are measured at, taken from the models that call them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens (B, L, D) in H heads, and the latents behind them.

    Attributes:
        name: name on the command line and in records.
        batch, tokens, heads, head_dim: B, L, H, D / H.
        latent_values: values of one latent sample: 16 channels in patches of 1x2x2.
        dtype: dtype that models of this size compute in.
    """

    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_dim

    @property
    def latent_values(self) -> int:
        return self.tokens * 64

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.width}"


# apt_8b at 49 frames (13 latent frames), and the digits model at its training batch size.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="digits", batch=16, tokens=48, heads=4, head_dim=64, dtype=torch.float32),
        Shape(name="1024px", batch=1, tokens=64 * 64, heads=24, head_dim=128),
        Shape(name="480p", batch=1, tokens=13 * 30 * 52, heads=24, head_dim=128),
        Shape(name="720p", batch=1, tokens=13 * 45 * 80, heads=24, head_dim=128),
        # To test the harness on a CPU: large enough for a pass to take a millisecond.
        Shape(name="cpu", batch=2, tokens=512, heads=6, head_dim=128, dtype=torch.float32),
    )
}


def default_shapes(device: torch.device) -> list[Shape]:
    """Return the shapes that a device is measured at by default: on a CPU, the two small ones."""
    names = ("digits", "cpu") if device.type == "cpu" else ("digits", "1024px", "480p", "720p")
    return [SHAPES[name] for name in names]
