"""Registries of model configurations, and the functions that build from them.

A builder takes no argument and returns a frozen config dataclass with a `build()` method; overrides
replace its fields. A model's identity in a file is its registered name and its config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn

from apt.hub.pretrained import PretrainedEntry
from apt.models.protocols import Backbone, LatentCodec, TextEncoder
from apt.registry import B, Registry, replace_typed


class Buildable(Protocol):
    """A frozen config dataclass."""

    def build(self) -> Any: ...


class ModelRegistry(Registry[Buildable]):
    """Model sizes by name, each with the published weights that exist for it."""

    def __init__(self) -> None:
        super().__init__("model")
        self._pretrained: dict[str, Mapping[str, PretrainedEntry]] = {}

    def register(
        self, name: str, *, pretrained: Mapping[str, PretrainedEntry] | None = None
    ) -> Callable[[B], B]:
        """Decorator: put a builder under `name`; `pretrained` maps tags to weights, best first."""
        add = super().register(name)

        def add_with_weights(builder: B) -> B:
            add(builder)
            self._pretrained[name] = dict(pretrained or {})
            return builder

        return add_with_weights

    def pretrained(self, name: str) -> Mapping[str, PretrainedEntry]:
        """Published weights of a model by tag; the first is the default. Empty: there are none."""
        self.get(name)
        return self._pretrained[name]


MODELS = ModelRegistry()
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
