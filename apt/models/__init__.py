"""Backbones, discriminator, text encoders and latent codecs, each chosen by name."""

from __future__ import annotations

from apt.checkpoints.layouts import FAMILIES
from apt.models import (
    codec_causal,
    codec_diffusers,
    codecs,
    mmdit,
    sd3,
    text_bytes,
    text_sd3,
    text_transformers,
    wan,
)
from apt.models.architectures import CODECS, HEADS, MODELS, TEXT_ENCODERS, list_models
from apt.models.create import create_codec, create_model, create_text_encoder
from apt.models.discriminator import Discriminator, create_discriminator

__all__ = [
    "CODECS",
    "FAMILIES",
    "HEADS",
    "MODELS",
    "TEXT_ENCODERS",
    "Discriminator",
    "codec_causal",
    "codec_diffusers",
    "codecs",
    "create_codec",
    "create_discriminator",
    "create_model",
    "create_text_encoder",
    "list_models",
    "mmdit",
    "sd3",
    "text_bytes",
    "text_sd3",
    "text_transformers",
    "wan",
]
