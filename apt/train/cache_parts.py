"""The parts of a model that a run on a latent cache does not load."""

from __future__ import annotations

from typing import Any

from apt.checkpoints.info import ComponentInfo
from apt.data.latents import LatentFolder
from apt.errors import ConfigError
from apt.models.architectures import CODECS, TEXT_ENCODERS
from apt.models.cached import CachedCodec, CachedTextEncoder

# How a part computes, not what.
_FREE_OPTIONS = ("dtype", "tiling", "slicing", "chunk")
_LONGEST = 40


def cached_codec(cache: LatentFolder, part: ComponentInfo) -> CachedCodec:
    """The model's codec as far as its latents tell; raises ConfigError if another one made them."""
    _check("codec", cache, cache.info.codec, part)
    return CachedCodec(
        CODECS.configured(part.architecture, part.config),
        channels=cache.info.channels,
        temporal_compression=cache.info.temporal_compression,
        spatial_compression=cache.info.spatial_compression,
    )


def cached_text_encoder(cache: LatentFolder, part: ComponentInfo) -> CachedTextEncoder:
    """The model's text encoder as a table; raises ConfigError if another one made it."""
    _check("text encoder", cache, cache.info.text_encoder, part)
    return CachedTextEncoder(TEXT_ENCODERS.configured(part.architecture, part.config), cache.texts)


def _check(
    kind: str, cache: LatentFolder, made_by: dict[str, Any] | None, part: ComponentInfo
) -> None:
    again = "encode the videos again with `diffusion-apt data encode --model` of this model"
    if made_by is None:
        raise ConfigError(
            f"{cache.directory} has no text embeddings, as the model that it was made for trains "
            f"its own text encoder, but this one's is {part.architecture!r}; {again}"
        )
    # Through `ComponentInfo`, as JSON has lists where configs have tuples.
    theirs = ComponentInfo(architecture=made_by["architecture"], config=made_by["config"])
    if theirs.architecture != part.architecture:
        raise ConfigError(
            f"{cache.directory} was made by the {kind} {theirs.architecture!r}, this model's is "
            f"{part.architecture!r}; {again}"
        )
    names = (theirs.config.keys() | part.config.keys()) - set(_FREE_OPTIONS)
    changed = [
        f"{name} (cache: {_shown(theirs.config.get(name))}, model: {_shown(part.config.get(name))})"
        for name in sorted(names)
        if theirs.config.get(name) != part.config.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{cache.directory} was made by another {kind} than this model's: "
            f"{', '.join(changed)}; {again}"
        )


def _shown(value: Any) -> str:
    """A value in a message: of a long one, such as statistics by channel, the beginning."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
