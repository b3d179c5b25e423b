"""What a run can be told to train on by name: a registered class with its options."""

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
    """The clips that a run asks a source for.

    Attributes:
        frames, height, width: of a clip; with `native_ratio` height times width is a budget.
        fps: frame rate; 0 keeps each video's own.
        seed: of whatever is drawn, such as where in a video a clip starts.
        size_multiple: heights and widths are multiples of this.
        native_ratio: aspect-ratio buckets near each file's own shape.
        images: "mix" gives images as clips of one frame beside the videos; "only" and "none".
        strict: stop at the first file that cannot be used.
        captions: what becomes of captions that the text encoder refuses; None asks no encoder.
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
        """The sizes of clips that a folder of files is sorted into. Raises ConfigError as
        `make_buckets`."""
        moving, still = {self.frames}, {1}
        frames = sorted({"mix": still | moving, "only": still, "none": moving}[self.images])
        if self.native_ratio:
            return make_buckets(self.height * self.width, self.size_multiple, frames=frames)
        return [Bucket(count, self.height, self.width) for count in frames]


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where clips come from; its fields are options (--data.options NAME VALUE).

    Class attributes:
        names_folders: options that name folders or files of this machine, which nobody else gets to
            read; `path`, which is --data.path, always is one.
        gives_latents: whether it is a cache of latents that stand for clips.
    """

    names_folders: ClassVar[tuple[str, ...]] = ()
    gives_latents: ClassVar[bool] = False

    @abstractmethod
    def open(self, request: ClipRequest) -> Any:
        """The data set: `apt.data.dataset.TrainingData`, or what `check_clips` makes it of.

        Raises:
            ConfigError: it does not have such clips.
            DataError: there is nothing, or nothing usable.
        """

    def open_heldout(self, request: ClipRequest) -> Any | None:
        """Clips that `open` never gives, from a source without end; None: a part is held out."""
        return None

    def latent_cache(self) -> Path | None:
        """The folder of a source that gives latents; raises ConfigError if none is named."""
        return None


DATASETS: Registry[DataSource] = Registry("data source")
"""Classes of sources by name, `--data.source`."""
