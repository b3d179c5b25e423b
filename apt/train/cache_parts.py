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

# How a part computes, not what.
_FREE_OPTIONS = ("dtype", "tiling", "slicing", "chunk")
_LONGEST = 40


def cached_codec(cache: Path, part: ComponentInfo) -> CachedCodec:
    """The model's codec as far as its latents tell; raises ConfigError if another one made them."""
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
    """The model's text encoder as a table; raises ConfigError if another one made it.

    Of several ranks, all must call it with their `from_main`: one looks at what there is.
    """
    _check("text encoder", cache, read_cache_info(cache).text_encoder, part)
    texts = from_main(lambda: TextFolder(cache))
    return CachedTextEncoder(TEXT_ENCODERS.configured(part.architecture, part.config), texts)


def _check(kind: str, cache: Path, made_by: dict[str, Any] | None, part: ComponentInfo) -> None:
    again = "encode the videos again with `diffusion-apt data encode --model` of this model"
    if made_by is None:
        raise ConfigError(
            f"{cache} has no text embeddings, as the model that it was made for trains "
            f"its own text encoder, but this one's is {part.architecture!r}; {again}"
        )
    # Through `ComponentInfo`, as JSON has lists where configs have tuples.
    theirs = ComponentInfo(architecture=made_by["architecture"], config=made_by["config"])
    if theirs.architecture != part.architecture:
        raise ConfigError(
            f"{cache} was made by the {kind} {theirs.architecture!r}, this model's is "
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
            f"{cache} was made by another {kind} than this model's: {', '.join(changed)}; {again}"
        )


def _shown(value: Any) -> str:
    """A value in a message: of a long one, such as statistics by channel, the beginning."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
