"""Data sources that a run can name: registered classes with their options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from apt.data.buckets import Bucket, make_buckets
from apt.data.captions import CaptionRule
from apt.registry import Registry

__all__ = ["DATASETS", "ClipRequest", "DataSource"]


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """The clips that a run requests from a source.

    Attributes:
        frames, height, width: of a clip; with `native_ratio`, height times width is a pixel budget.
        fps: frame rate; 0 keeps each video's own.
        seed: of all random draws, such as where in a video a clip starts.
        size_multiple: heights and widths are multiples of this.
        native_ratio: use aspect-ratio buckets near each file's own shape.
        images: "mix" includes images as clips of one frame, "only" uses nothing else, and "none"
            leaves them out.
        strict: stop at the first file that cannot be used.
        captions: how to treat captions that the text encoder rejects; None checks no captions.
        captioned: whether captions are read at all.
    """

    frames: int
    height: int
    width: int
    fps: float = 0.0
    seed: int = 0
    size_multiple: int = 8
    native_ratio: bool = True
    images: Literal["mix", "only", "none"] = "mix"
    strict: bool = False
    captions: CaptionRule | None = None
    captioned: bool = True

    @property
    def size(self) -> Bucket:
        """Frames, height and width."""
        return Bucket(self.frames, self.height, self.width)

    def buckets(self) -> list[Bucket]:
        """Return the clip sizes into which the files are sorted.

        Raises ConfigError as `make_buckets` does.
        """
        moving, still = {self.frames}, {1}
        frames = sorted({"mix": still | moving, "only": still, "none": moving}[self.images])
        if self.native_ratio:
            return make_buckets(self.height * self.width, self.size_multiple, frames=frames)
        return [Bucket(count, self.height, self.width) for count in frames]


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """A source of clips; its fields are options (--data.options NAME VALUE).

    Class attributes:
        names_folders: options that name folders or files of this machine, which are kept out of
            everything that is published; `path` (--data.path) is always one of them.
        gives_latents: whether it is a cache of latents instead of clips.
    """

    names_folders: ClassVar[tuple[str, ...]] = ()
    gives_latents: ClassVar[bool] = False

    @abstractmethod
    def open(self, request: ClipRequest) -> Any:
        """Return the data set: `apt.data.dataset.TrainingData`, or an input of `check_clips`.

        Raises:
            ConfigError: if the source has no such clips.
            DataError: if there is nothing, or nothing usable.
        """

    def open_heldout(self, request: ClipRequest) -> Any | None:
        """Return clips that `open` never gives, if the source is endless; None splits its clips."""
        return None

    def latent_cache(self) -> Path | None:
        """Return the folder of a source of latents. Raises ConfigError if none is named."""
        return None


DATASETS: Registry[DataSource] = Registry("data source")
"""Source classes by name, for `--data.source`."""
