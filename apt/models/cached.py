"""Stand-ins for a text encoder and a codec whose outputs are cached, without their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from apt.condition import EncodedText, TextEncoder
from apt.errors import InputError, listed
from apt.pixels import LatentCodec


class CachedTextEncoder(TextEncoder):
    """Looks up the embeddings of prompts instead of computing them.

    Args:
        config: the config of the encoder that made the embeddings.
        texts: embeddings of one row each, by prompt.
    """

    _here: Tensor

    def __init__(self, config: Any, texts: Mapping[str, EncodedText]) -> None:
        super().__init__()
        self.config = config
        self._texts = texts
        lengths = [texts[prompt].tokens.shape for prompt in [*texts][:1]]
        self.embedding_dim = int(lengths[0][2]) if lengths else 0
        self.max_length = int(getattr(config, "max_length", 0))
        # Moves with the module, and so tells on which device embeddings are needed.
        self.register_buffer("_here", torch.empty(0), persistent=False)

    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Return the embeddings of prompts; raises InputError for prompts that are not cached."""
        self.check(prompts)
        rows = EncodedText.concatenate([self._texts[prompt] for prompt in prompts])
        return rows.to(self._here.device)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise InputError for prompts that are not cached."""
        missing = sorted({prompt for prompt in prompts if prompt not in self._texts})
        if missing:
            raise InputError(
                f"the latent cache has no embedding of {listed(map(repr, missing))}; add it with "
                "`data encode --prompts` (an existing cache is completed)"
            )


class CachedCodec(LatentCodec):
    """Knows the shapes of latents, but neither encodes nor decodes.

    Args:
        config: the config of the codec that made the latents.
        channels, temporal_compression, spatial_compression: those of that codec.
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
        raise InputError(
            "this run uses cached latents, and has no codec to encode pixels; train on the videos "
            "themselves"
        )

    def decode(self, latents: Tensor) -> NoReturn:
        raise InputError(
            "this run uses cached latents, and has no codec to decode them; train on the videos "
            "themselves"
        )

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T', H', W') for a clip of a valid size."""
        p = self.spatial_compression
        return (frames - 1) // self.temporal_compression + 1, height // p, width // p
