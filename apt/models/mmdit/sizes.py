"""The registered sizes of `MMDiT`: models of our own."""

from __future__ import annotations

import dataclasses

from apt.models.architectures import MODELS
from apt.models.mmdit.model import MMDiTConfig


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
        rope_theta=10.0,  # as above: the grid is the same
        absolute_positions=True,
    )


@MODELS.register("mmdit_tiny")
def mmdit_tiny() -> MMDiTConfig:
    """4 M parameters for small clips of your own, in latents: on a laptop."""
    return mmdit_digits_latent()


@MODELS.register("mmdit_mini")
def mmdit_mini() -> MMDiTConfig:
    """18 M parameters for clips of your own, in latents: on a workstation."""
    return dataclasses.replace(mmdit_tiny(), hidden_size=384, depth=8, num_heads=6)


@MODELS.register("mmdit_small")
def mmdit_small() -> MMDiTConfig:
    """0.3 B parameters for VAE latents: experiments on one GPU."""
    return MMDiTConfig(hidden_size=1024, depth=12, num_heads=16, text_dim=4096)


@MODELS.register("apt_8b")
def apt_8b() -> MMDiTConfig:
    """8 B parameters: the shape of the paper's model (APT Sec. 3.1)."""
    return MMDiTConfig(hidden_size=3072, depth=36, num_heads=24, text_dim=4096)
