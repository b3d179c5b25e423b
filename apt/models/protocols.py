"""What the rest of the package asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from apt.models.conditions import TextCondition


class VelocityNetwork(Protocol):
    """What samplers and losses ask of a network: its velocity."""

    def __call__(
        self, x: Tensor, t: Tensor, c: TextCondition, *, rows: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, T, H, W) at latents x (B, C, T, H, W).

        `t` (R,) in [0, 1] and `c` (R rows) are shared by samples through `rows` (B,) int64;
        without `rows`, R = B.
        """
        ...


@runtime_checkable
class Backbone(VelocityNetwork, Protocol):
    """A velocity network that also shows its hidden tokens. Implementations are `nn.Module`s.

    Attributes:
        config: the frozen dataclass it was built from.
        hidden_size: D.
        depth: number of transformer blocks.
        in_channels: latent channels C.
    """

    config: Any
    hidden_size: int
    depth: int
    in_channels: int

    def hidden_states(
        self,
        x: Tensor,
        t: Tensor,
        c: TextCondition,
        *,
        layers: Sequence[int],
        rows: Tensor | None = None,
    ) -> list[Tensor]:
        """Visual tokens (B, L, D) after each block of `layers`, counted from 1.

        Blocks after the last one asked for are not run.
        """
        ...

    def token_grid(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along time, height and width for a latent (T, H, W). L is their product."""
        ...

    def block_list(self) -> Sequence[nn.Module]:
        """The transformer blocks in order: the units of sharding and checkpointing."""
        ...

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        ...

    def keep_hidden_states(self, last_layer: int) -> None:
        """Delete what `hidden_states` up to `last_layer` never runs, so every parameter trains."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts to conditions. Implementations are `nn.Module`s.

    Attributes:
        embedding_dim: E.
        max_length: the longest prompt it takes, in its own tokens.
    """

    config: Any
    embedding_dim: int
    max_length: int

    def __call__(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts; raises InputError for a prompt that it cannot take."""
        ...


@runtime_checkable
class LatentCodec(Protocol):
    """Pixels (B, 3, T, H, W) in [-1, 1] to latents (B, C, T', H', W') of about unit variance.

    Attributes:
        channels: C.
        temporal_compression: 4 means 4k + 1 frames become k + 1 latent frames.
        spatial_compression: pixels per latent along height and width.
    """

    config: Any
    channels: int
    temporal_compression: int
    spatial_compression: int

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W'); raises InputError for sizes that do not fit, naming ones that do."""
        ...
