"""The data set that a configuration names."""

from __future__ import annotations

from apt.data.buckets import Bucket, make_buckets
from apt.data.digits import FRAMES, SIZE, MovingDigits
from apt.data.folder import VideoFolder
from apt.data.sample import VideoDataset
from apt.errors import ConfigError
from apt.train.config import DataConfig


def make_dataset(config: DataConfig, *, seed: int) -> VideoDataset:
    """Build the data set of a run.

    Raises:
        ConfigError: a folder is asked for without a path, or the digits in another size.
        DataError: nothing usable in the folder.
    """
    if config.source == "digits":
        if (config.frames, config.height, config.width) != (FRAMES, SIZE, SIZE):
            raise ConfigError(
                f"the built-in digits are {FRAMES} frames of {SIZE}x{SIZE}, not {config.frames} of "
                f"{config.height}x{config.width}; use --data.source folder for other sizes"
            )
        return MovingDigits(seed)
    if not config.path:
        raise ConfigError(
            "--data.path is empty: name the folder of captioned videos "
            "(`diffusion-apt data check DIR` shows what is in one)"
        )
    frames = {"mix": {1, config.frames}, "only": {1}, "none": {config.frames}}[config.images]
    if config.native_ratio:
        buckets = make_buckets(
            config.height * config.width, config.size_multiple, frames=sorted(frames)
        )
    else:
        buckets = [Bucket(count, config.height, config.width) for count in sorted(frames)]
    return VideoFolder(
        config.path, buckets=buckets, fps=config.fps or None, seed=seed, strict=config.strict
    )
