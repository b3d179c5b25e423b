"""The parts of a model that a run on a latent cache does not load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apt.checkpoints.info import ComponentInfo
from apt.data.latents import TextFolder, read_cache_info
from apt.distributed.parallel import FromMain, made_here
from apt.errors import ConfigError
from apt.models.architectures import CODECS, TEXT_ENCODERS
from apt.models.cached import CachedCodec, CachedTextEncoder

# Options that change how a part computes, but not its results.
_FREE_OPTIONS = ("dtype", "tiling", "slicing", "chunk")
_LONGEST = 40


def cached_codec(cache: Path, part: ComponentInfo) -> CachedCodec:
    """Return what a latent cache tells of the model's codec.

    Raises ConfigError if another codec made the latents.
    """
    info = read_cache_info(cache)
    _check("codec", cache, info.codec, part)
    return CachedCodec(
        CODECS.configured(part.architecture, part.config),
        channels=info.channels,
        temporal_compression=info.temporal_compression,
        spatial_compression=info.spatial_compression,
    )


def cached_text_encoder(
    cache: Path, part: ComponentInfo, from_main: FromMain = made_here
) -> CachedTextEncoder:
    """Return the model's text encoder as a table of cached embeddings.

    With several ranks, all must call it with their `from_main`, and one rank lists the files.

    Raises ConfigError if another text encoder made the embeddings.
    """
    _check("text encoder", cache, read_cache_info(cache).text_encoder, part)
    texts = from_main(lambda: TextFolder(cache))
    return CachedTextEncoder(TEXT_ENCODERS.configured(part.architecture, part.config), texts)


def _check(kind: str, cache: Path, made_by: dict[str, Any] | None, part: ComponentInfo) -> None:
    again = "encode the videos again by `diffusion-apt data encode --model` with this model"
    if made_by is None:
        raise ConfigError(
            f"{cache} has no text embeddings, because it was made for a model that trains its own "
            f"text encoder, but this model needs those of {part.architecture!r}; {again}"
        )
    # Convert by `ComponentInfo`, because JSON has lists where configs have tuples.
    theirs = ComponentInfo(architecture=made_by["architecture"], config=made_by["config"])
    if theirs.architecture != part.architecture:
        raise ConfigError(
            f"{cache} was made by the {kind} {theirs.architecture!r}, but this model has "
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
            f"{cache} was made by a {kind} with other options than this model's: "
            f"{', '.join(changed)}; {again}"
        )


def _shown(value: Any) -> str:
    """Return a value for a message; a long one, such as statistics by channel, is cut."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
