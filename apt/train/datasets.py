"""The data set that a configuration names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from apt.data.buckets import Bucket, make_buckets
from apt.data.digits import FRAMES, SIZE, MovingDigits
from apt.data.folder import VideoFolder
from apt.data.latents import LatentFolder, read_cache_info
from apt.data.sample import TrainingData
from apt.errors import ConfigError
from apt.train.config import DataConfig, TrainConfig


def make_dataset(config: DataConfig, *, seed: int) -> TrainingData:
    """Build the data set of a run.

    Raises:
        ConfigError: a folder is asked for without a path, or the digits in another size.
        DataError: nothing usable in the folder, or a latent cache that is damaged or incomplete.
    """
    if config.source == "digits":
        if (config.frames, config.height, config.width) != (FRAMES, SIZE, SIZE):
            raise ConfigError(
                f"the built-in digits are {FRAMES} frames of {SIZE}x{SIZE}, not {config.frames} of "
                f"{config.height}x{config.width}; use --data.source folder for other sizes"
            )
        return MovingDigits(seed)
    _check_path(config)
    if config.source == "latents":
        return LatentFolder(config.path, images=config.images)
    return VideoFolder(
        config.path,
        buckets=clip_buckets(config),
        fps=config.fps or None,
        seed=seed,
        strict=config.strict,
    )


def clip_buckets(config: DataConfig) -> list[Bucket]:
    """The sizes of clips that a configuration asks for."""
    frames = {"mix": {1, config.frames}, "only": {1}, "none": {config.frames}}[config.images]
    if config.native_ratio:
        return make_buckets(
            config.height * config.width, config.size_multiple, frames=sorted(frames)
        )
    return [Bucket(count, config.height, config.width) for count in sorted(frames)]


def with_cached_size(config: TrainConfig) -> TrainConfig:
    """The configuration with the clip size and frame rate of the latent cache that it names."""
    data = config.data
    if data.source != "latents":
        return config
    _check_path(data)
    info = read_cache_info(Path(data.path))
    frames = 1 if data.images == "only" else info.frames
    data = dataclasses.replace(
        data, frames=frames, height=info.height, width=info.width, fps=info.fps
    )
    return dataclasses.replace(config, data=data)


def _check_path(config: DataConfig) -> None:
    if not config.path:
        raise ConfigError(
            "--data.path is empty: name the folder of captioned videos "
            "(`diffusion-apt data check DIR` shows what is in one), or the latent cache"
        )
