"""The data sources that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn

from apt.data.digits import FRAMES, SIZE, MovingDigits, Setting
from apt.data.folder import VideoFolder
from apt.data.latents import LatentFolder
from apt.data.source import DATASETS, ClipRequest, DataSource
from apt.errors import ConfigError

__all__ = ["DATASETS", "DIGITS", "OBJECT", "Digits", "Folder", "Latents"]

DIGITS = "digits"
OBJECT = "object"


@DATASETS.register(DIGITS)
@dataclass(frozen=True, kw_only=True)
class Digits(DataSource):
    """The built-in stream of moving digits, 9 frames of 32x32.

    Attributes:
        setting: "centred", or "free" in place and background.
    """

    setting: Setting = "centred"

    def open(self, request: ClipRequest) -> MovingDigits:
        if request.size != (FRAMES, SIZE, SIZE):
            raise ConfigError(
                f"the built-in digits are {FRAMES} frames of {SIZE}x{SIZE}, not {request.frames} "
                f"of {request.height}x{request.width}; use --data.source folder for other sizes"
            )
        return MovingDigits(request.seed, setting=self.setting)


@DATASETS.register("folder")
@dataclass(frozen=True, kw_only=True)
class Folder(DataSource):
    """Your own captioned videos and images, in a folder (--data.path)."""

    path: str = ""

    def open(self, request: ClipRequest) -> VideoFolder:
        return VideoFolder(
            named_folder(self.path),
            buckets=request.buckets(),
            fps=request.fps or None,
            seed=request.seed,
            strict=request.strict,
            captions=request.captions,
        )


@DATASETS.register("latents")
@dataclass(frozen=True, kw_only=True)
class Latents(DataSource):
    """What `diffusion-apt data encode` made of a folder (--data.path); its size and rate hold."""

    gives_latents: ClassVar[bool] = True

    path: str = ""

    def open(self, request: ClipRequest) -> LatentFolder:
        cache = named_folder(self.path)
        return LatentFolder(cache, images=request.images, captions=request.captions)

    def latent_cache(self) -> Path:
        return named_folder(self.path)


@DATASETS.register(OBJECT)
@dataclass(frozen=True, kw_only=True)
class GivenObject(DataSource):
    """A data set handed to `apt.train.run`, from Python alone."""

    def open(self, request: ClipRequest) -> NoReturn:
        raise ConfigError(
            "--data.source object stands for a data set that was handed to apt.train.run: hand it "
            "over in Python, apt.train.run(config, dataset=...)"
        )


def named_folder(path: str) -> Path:
    """The folder. Raises ConfigError if none is named."""
    if not path:
        raise ConfigError(
            "--data.path is empty: name the folder of captioned videos "
            "(`diffusion-apt data check DIR` shows what is in one), or the latent cache"
        )
    return Path(path)
