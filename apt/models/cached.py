"""Stand-ins for a text encoder and a codec whose results were stored: nothing heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from apt.condition import EncodedText, TextEncoder
from apt.errors import InputError, listed
from apt.pixels import LatentCodec


class CachedTextEncoder(TextEncoder):
    """Looks prompts up instead of encoding them.

    Args:
        config: that of the encoder which made the embeddings.
        texts: embeddings of one row, by prompt.
    """

    _here: Tensor

    def __init__(self, config: Any, texts: Mapping[str, EncodedText]) -> None:
        super().__init__()
        self.config = config
        self._texts = texts
        lengths = [texts[prompt].tokens.shape for prompt in [*texts][:1]]
        self.embedding_dim = int(lengths[0][2]) if lengths else 0
        self.max_length = int(getattr(config, "max_length", 0))
        # Moves with the module, and says where embeddings have to be.
        self.register_buffer("_here", torch.empty(0), persistent=False)

    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Embeddings of prompts; raises InputError for those that were not stored."""
        self.check(prompts)
        rows = EncodedText.concatenate([self._texts[prompt] for prompt in prompts])
        return rows.to(self._here.device)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise InputError for prompts that were not stored."""
        missing = sorted({prompt for prompt in prompts if prompt not in self._texts})
        if missing:
            raise InputError(
                f"the latent cache has no embedding of {listed(map(repr, missing))}; name it with "
                "`data encode --prompts` (a cache that is there gets what is missing)"
            )


class CachedCodec(LatentCodec):
    """Knows the shapes of latents, and neither encodes nor decodes.

    Args:
        config: that of the codec which made the latents.
        channels, temporal_compression, spatial_compression: of that codec.
    """

    def __init__(
        self, config: Any, *, channels: int, temporal_compression: int, spatial_compression: int
    ) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.temporal_compression = temporal_compression
        self.spatial_compression = spatial_compression

    def encode(self, pixels: Tensor) -> NoReturn:
        raise InputError("this run was given latents, and has no codec to encode pixels with")

    def decode(self, latents: Tensor) -> NoReturn:
        raise InputError("this run was given latents, and has no codec to decode them with")

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W') for a clip of a size that the codec takes."""
        p = self.spatial_compression
        return (frames - 1) // self.temporal_compression + 1, height // p, width // p
