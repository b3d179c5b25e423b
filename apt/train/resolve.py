"""What a configuration leaves open, filled in from the model and the data that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from apt.checkpoints.info import SampleInfo
from apt.checkpoints.load import load_prompt_check
from apt.data.latents import read_cache_info
from apt.models.architectures import TEXT_ENCODERS
from apt.models.protocols import PromptCheck
from apt.registry import replace_typed
from apt.train.config import DataConfig, TrainConfig
from apt.train.objects import NO_OBJECTS, Objects

__all__ = ["advice", "prompt_check", "resolve", "rounded"]

# The share of an exported average that the weights may have which the run began with.
_STALE = 0.05
# The share of a batch that may be added or left out so that it divides by the ranks.
_ROUNDING = 0.02


def resolve(
    config: TrainConfig, start: SampleInfo | None, before: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The configuration with nothing left open.

    Size and rate of clips are those of the latent cache, or else of the model that the stage starts
    from, where the configuration has None. `ema_warmup` is decided when a run begins.

    Args:
        config: as it was written.
        start: what the model that the stage starts from was trained on; None for random weights.
        before: the configuration in the checkpoint that is continued.

    Raises:
        ConfigError: the path of the cache is missing.
        DataError: the latent cache cannot be read.
    """
    warmup = config.ema_warmup
    if warmup is None and before is not None:
        warmup = bool(before.get("ema_warmup"))
    elif warmup is None:
        warmup = config.stage.starts_from is None and _stale_share(config) > _STALE
    return dataclasses.replace(config, data=_with_size(config.data, start), ema_warmup=warmup)


def rounded(config: TrainConfig, data_size: int) -> tuple[TrainConfig, str | None]:
    """A batch size that does not divide by the ranks made one that does, and what is said of it.

    Only where that is next to nothing; the loader says what is wrong with others.

    Args:
        data_size: ranks, or groups of them, that have samples of their own.
    """
    unit = data_size * max(config.micro_batch_size, 1)
    size = max(1, round(config.batch_size / unit)) * unit
    if size == config.batch_size or abs(size - config.batch_size) > _ROUNDING * config.batch_size:
        return config, None
    each = f" with micro-batches of {config.micro_batch_size}" if config.micro_batch_size else ""
    said = (
        f"batch_size {config.batch_size} does not divide by {data_size} ranks{each}: rounded to "
        f"{size}; --batch-size {size} continues the run on other numbers of ranks"
    )
    return dataclasses.replace(config, batch_size=size), said


def prompt_check(config: TrainConfig, objects: Objects = NO_OBJECTS) -> PromptCheck | None:
    """What the run's text encoder checks captions with.

    None if a cache has its embeddings, or captions do not matter. `objects` are in place of names.
    """
    if not config.stage.reads_captions:
        return None
    field = config.stage.starts_from
    cache = config.data.make_source().latent_cache()
    if cache is not None and read_cache_info(cache).text_encoder:
        return None
    if field is not None and field in objects.bundles:
        return objects.bundles[field].text_encoder.check
    if objects.text_encoder is not None:
        return objects.text_encoder.check
    if field is not None:
        return load_prompt_check(config.stage.source(field))
    model = config.model
    encoder = TEXT_ENCODERS.get(model.text_encoder)()
    return replace_typed(encoder, model.text_encoder_options).prompt_check()


def advice(config: TrainConfig, start: SampleInfo | None) -> list[str]:
    """What is doubtful about a resolved configuration, and what to do about it."""
    found = []
    optimizer, updates = config.optimizer, config.num_updates
    rising, falling = optimizer.warmup_updates, optimizer.decay_updates
    if rising + falling > updates:
        found.append(
            f"{rising} updates of warm-up and {falling} of decay are more than the run's {updates}:"
            " the learning rate never reaches its value; set --optimizer.warmup-updates"
        )
    share = _stale_share(config)
    if share > _STALE and not config.ema_warmup:
        decay = _STALE ** (1 / updates)
        found.append(
            f"{share:.0%} of the exported average will be the weights that the run starts from "
            f"(ema_decay {config.ema_decay:g} over {updates} updates); --ema-decay {decay:.3g} "
            f"would leave {_STALE:.0%}, and snapshots have the raw weights too"
        )
    if start is not None:
        found += _size_differs(start, config.data)
    return found


def _stale_share(config: TrainConfig) -> float:
    """How much of the average the first weights are at the end, without a warm-up."""
    return float(config.ema_decay**config.num_updates)


def _with_size(data: DataConfig, start: SampleInfo | None) -> DataConfig:
    only_images = data.images == "only"
    cache = data.make_source().latent_cache()
    if cache is not None:
        info = read_cache_info(cache)
        return dataclasses.replace(
            data,
            frames=1 if only_images else info.frames,
            height=info.height,
            width=info.width,
            fps=info.fps,
        )
    clip = start or data.clip
    frames = 1 if only_images else clip.frames
    return dataclasses.replace(
        data,
        frames=frames if data.frames is None else data.frames,
        height=clip.height if data.height is None else data.height,
        width=clip.width if data.width is None else data.width,
        fps=clip.fps if data.fps is None else data.fps,
    )


def _size_differs(model: SampleInfo, data: DataConfig) -> list[str]:
    clip = data.clip
    frames = clip.frames != model.frames and data.images != "only"
    size = (clip.height, clip.width) != (model.height, model.width)
    rate = clip.fps != model.fps and clip.fps and model.fps and data.images != "only"
    if not (frames or size or rate):
        return []
    return [
        f"the model that this stage starts from was trained on {_words(model)}, this stage is "
        f"trained on, and exported for, {_words(clip)}"
    ]


def _words(clip: SampleInfo) -> str:
    rate = f" at {clip.fps:g} fps" if clip.fps else ""
    return f"{clip.frames} frames of {clip.height}x{clip.width}{rate}"
