"""What the rest of the package asks of the parts around a backbone, `apt.models.transformer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from apt.condition import EncodedText
from apt.errors import InputError


class TextEncoder(nn.Module):
    """Prompts to the text of conditions.

    Attributes:
        config: the frozen dataclass it was built from.
        embedding_dim: E.
        max_length: the longest prompt it takes, in its own tokens.
    """

    config: Any
    embedding_dim: int
    max_length: int

    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts; raises InputError for a prompt that it cannot take."""
        raise NotImplementedError

    def check(self, prompts: Sequence[str]) -> None:
        """Raise InputError as encoding would, PromptLengthError for length, and compute nothing."""
        raise NotImplementedError


class PromptCheck(Protocol):
    """`TextEncoder.check` by itself: it needs a tokenizer at most, and no weights."""

    def __call__(self, prompts: Sequence[str]) -> None:
        """Raise PromptLengthError for a prompt that is too long, InputError for other faults."""
        ...


class LatentCodec(nn.Module):
    """Pixels (B, 3, T, H, W) in [-1, 1] to latents (B, C, T', H', W') of about unit variance.

    Attributes:
        config: the frozen dataclass it was built from.
        channels: C.
        temporal_compression: 4 means 4k + 1 frames become k + 1 latent frames.
        spatial_compression: pixels per latent along height and width.
        encodes_in_autocast: whether a training run may encode in its own precision. Codecs of
            others compute as their config says.
    """

    config: Any
    channels: int
    temporal_compression: int
    spatial_compression: int
    encodes_in_autocast: bool = False

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels; raises InputError for sizes that do not fit."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents."""
        raise NotImplementedError

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') of a clip whose first frame is a latent frame of its own.

        Raises InputError for sizes that do not fit, naming the nearest that do.
        """
        temporal, spatial = self.temporal_compression, self.spatial_compression
        if frames < 1 or (frames - 1) % temporal:
            low = max(frames - 1, 0) // temporal * temporal + 1
            raise InputError(
                f"{frames} frames do not fit; use {low} or {low + temporal} ({temporal}k + 1)"
            )
        for name, size in (("height", height), ("width", width)):
            if size < spatial or size % spatial:
                low = max(size // spatial, 1) * spatial
                raise InputError(
                    f"{name} {size} does not fit; use a multiple of {spatial}, such as {low} or "
                    f"{low + spatial}"
                )
        return (frames - 1) // temporal + 1, height // spatial, width // spatial
