"""The data sources that come with the package."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn, TypeVar

from apt.data.digits import MovingDigits, Setting, clip_size
from apt.data.folder import VideoFolder
from apt.data.latents import LatentFolder
from apt.data.scan import Scan, scan_folder
from apt.data.shards import VideoShards, scan_shards
from apt.data.source import DATASETS, ClipRequest, DataSource
from apt.errors import ConfigError

__all__ = ["DATASETS", "DIGITS", "OBJECT", "Digits", "Files", "Folder", "Latents", "Shards"]

Clips = TypeVar("Clips", bound=VideoFolder)

DIGITS = "digits"
OBJECT = "object"


@DATASETS.register(DIGITS)
@dataclass(frozen=True, kw_only=True)
class Digits(DataSource):
    """The built-in stream of moving digits, 9 frames of 32x32.

    Attributes:
        setting: "centred"; "free", with varying places and backgrounds; "near", whose places vary
            less; or "large", which is free with 17 frames of 64x64.
    """

    setting: Setting = "centred"

    def open(self, request: ClipRequest) -> MovingDigits:
        digits = clip_size(self.setting)
        if request.size != (digits.frames, digits.side, digits.side):
            raise ConfigError(
                f"the built-in {self.setting} digits are {digits.frames} frames of "
                f"{digits.side}x{digits.side}, not {request.frames} of "
                f"{request.height}x{request.width}; use --data.source folder for other sizes"
            )
        return MovingDigits(request.seed, setting=self.setting)

    def open_heldout(self, request: ClipRequest) -> MovingDigits:
        """Return digits in handwriting that is never trained on."""
        return MovingDigits(request.seed, "test", setting=self.setting)


@dataclass(frozen=True, kw_only=True)
class Files(DataSource):
    """Captioned videos and images in a folder that can be listed without decoding them."""

    path: str = ""

    @staticmethod
    @abstractmethod
    def scan(directory: str | Path, *, captioned: bool = True) -> Scan:
        """List the files; see `apt.data.scan.scan_folder`."""


@DATASETS.register("folder")
@dataclass(frozen=True, kw_only=True)
class Folder(Files):
    """Your own captioned videos and images, in a folder (--data.path)."""

    @staticmethod
    def scan(directory: str | Path, *, captioned: bool = True) -> Scan:
        return scan_folder(directory, captioned=captioned)

    def open(self, request: ClipRequest) -> VideoFolder:
        return _folder(VideoFolder, self.path, request)


@DATASETS.register("webdataset")
@dataclass(frozen=True, kw_only=True)
class Shards(Files):
    """WebDataset shards, `.tar` files of captioned videos and images, in a folder (--data.path)."""

    @staticmethod
    def scan(directory: str | Path, *, captioned: bool = True) -> Scan:
        return scan_shards(directory, captioned=captioned)

    def open(self, request: ClipRequest) -> VideoShards:
        return _folder(VideoShards, self.path, request)


@DATASETS.register("latents")
@dataclass(frozen=True, kw_only=True)
class Latents(DataSource):
    """A latent cache from `diffusion-apt data encode` (--data.path), with its own size and rate."""

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
    """A data set passed to `apt.train.run`; only from Python."""

    def open(self, request: ClipRequest) -> NoReturn:
        raise ConfigError(
            "--data.source object stands for a data set that is passed in Python; call "
            "apt.train.run(config, dataset=...)"
        )


def _folder(kind: type[Clips], path: str, request: ClipRequest) -> Clips:
    return kind(
        named_folder(path),
        buckets=request.buckets(),
        fps=request.fps or None,
        seed=request.seed,
        strict=request.strict,
        captions=request.captions,
        captioned=request.captioned,
    )


def named_folder(path: str) -> Path:
    """Return the folder. Raises ConfigError if none is named."""
    if not path:
        raise ConfigError(
            "--data.path is empty: name the folder of captioned videos "
            "(`diffusion-apt data check DIR` shows what is in one), or the latent cache"
        )
    return Path(path)
