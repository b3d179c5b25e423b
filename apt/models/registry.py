"""Registries of model configurations, and the functions that build from them.

A builder takes no argument and returns a frozen config dataclass with a `build()` method; overrides
replace its fields. A model's identity in a file is its registered name and its config.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from apt.models.protocols import Backbone, LatentCodec, TextEncoder
from apt.registry import Registry, replace_typed


class Buildable(Protocol):
    """A frozen config dataclass."""

    def build(self) -> Any: ...


MODELS: Registry[Buildable] = Registry("model")
TEXT_ENCODERS: Registry[Buildable] = Registry("text encoder")
CODECS: Registry[Buildable] = Registry("latent codec")
HEADS: Registry[nn.Module] = Registry("discriminator head")


def create_model(name: str, /, **overrides: Any) -> Backbone:
    """Build a registered backbone with random weights; overrides are fields of its config.

    Raises InputError for an unknown name or field, with close matches.
    """
    return replace_typed(MODELS.get(name)(), overrides).build()


def create_text_encoder(name: str, /, **overrides: Any) -> TextEncoder:
    """Build a registered text encoder; overrides are fields of its config."""
    return replace_typed(TEXT_ENCODERS.get(name)(), overrides).build()


def create_codec(name: str, /, **overrides: Any) -> LatentCodec:
    """Build a registered latent codec; overrides are fields of its config."""
    return replace_typed(CODECS.get(name)(), overrides).build()


def list_models(pattern: str = "*") -> list[str]:
    """Names of registered backbones that match a shell-style pattern."""
    return MODELS.names(pattern)
