"""What latents a codec makes, found out without the weights of others."""

from __future__ import annotations

from typing import Any

from apt.models.codec_diffusers import DiffusersCodec, DiffusersCodecConfig
from apt.models.protocols import LatentCodec

__all__ = ["codec_shape"]


def codec_shape(config: Any) -> LatentCodec:
    """A codec of this config that tells its channels and compression, and need not do more.

    Raises as the codec itself, but for faults of its weights.
    """
    if isinstance(config, DiffusersCodecConfig):
        return DiffusersCodec(config, weights=False)
    codec: LatentCodec = config.build()
    return codec
