"""The data set that a configuration names."""

from __future__ import annotations

from apt.data.buckets import Bucket, make_buckets
from apt.data.captions import CaptionRule
from apt.data.dataset import TrainingData
from apt.data.digits import FRAMES, SIZE, MovingDigits
from apt.data.folder import VideoFolder
from apt.data.latents import LatentFolder
from apt.errors import ConfigError
from apt.models.protocols import PromptCheck
from apt.train.config import DataConfig


def make_dataset(
    config: DataConfig, *, seed: int, check: PromptCheck | None = None
) -> TrainingData:
    """Build the data set of a run.

    Args:
        config: what, and in which size.
        seed: of the order and of clips' starts.
        check: the text encoder's; None if it has read all captions already.

    Raises:
        ConfigError: a folder is asked for without a path, or the digits in another size.
        DataError: nothing usable in the folder, or a latent cache that is damaged or incomplete.
    """
    if config.source == "digits":
        clip = config.clip
        if (clip.frames, clip.height, clip.width) != (FRAMES, SIZE, SIZE):
            raise ConfigError(
                f"the built-in digits are {FRAMES} frames of {SIZE}x{SIZE}, not {clip.frames} of "
                f"{clip.height}x{clip.width}; use --data.source folder for other sizes"
            )
        return MovingDigits(seed, setting=config.setting)
    check_path(config)
    rule = None if check is None else CaptionRule(check, config.long_captions)
    if config.source == "latents":
        return LatentFolder(config.path, images=config.images, captions=rule)
    return VideoFolder(
        config.path,
        buckets=clip_buckets(config),
        fps=config.clip.fps or None,
        seed=seed,
        strict=config.strict,
        captions=rule,
    )


def clip_buckets(config: DataConfig) -> list[Bucket]:
    """The sizes of clips that a configuration asks for."""
    clip = config.clip
    frames = {"mix": {1, clip.frames}, "only": {1}, "none": {clip.frames}}[config.images]
    if config.native_ratio:
        return make_buckets(clip.height * clip.width, config.size_multiple, frames=sorted(frames))
    return [Bucket(count, clip.height, clip.width) for count in sorted(frames)]


def check_path(config: DataConfig) -> None:
    """Raise ConfigError if the source is a folder and none is named."""
    if not config.path:
        raise ConfigError(
            "--data.path is empty: name the folder of captioned videos "
            "(`diffusion-apt data check DIR` shows what is in one), or the latent cache"
        )
