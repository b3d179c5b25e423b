"""`diffusion-apt data digits`: the built-in data set as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from apt.cli.app import parse
from apt.cli.output import printing
from apt.cli.progress import progress_bar
from apt.errors import counted


@dataclass(frozen=True)
class DataDigits:
    """Write the built-in moving digits as H.264 .mp4 files with a metadata.csv.

    Real handwriting in colour, moving over real photographs: 9 frames of 32x32 at 8 frames per
    second, 17 of 64x64 at 16 in the large setting. The same seed and split give the same clips. An
    interrupted call can be repeated.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Where to write; made if need be."""
    num: int = 1000
    """Number of clips."""
    seed: int = 0
    """Another seed gives other clips."""
    split: Literal["train", "test", "heldout"] = "train"
    """train; test: handwriting held out; heldout: captions held out as well."""
    setting: Literal["centred", "near", "free", "large"] = "centred"
    """centred: a caption tells where the digit is; free: places and backgrounds vary; near: places
    vary less; large: free ones of twice the size and rate."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Write the folder and say where it is."""
    options = parse(DataDigits, args, prog=prog)

    from apt.data.digits import MovingDigits, clip_size
    from apt.data.write import write_video_folder

    dataset = MovingDigits(options.seed, options.split, setting=options.setting)
    fps = clip_size(options.setting).fps
    with progress_bar("writing", options.num) as update:
        folder = write_video_folder(dataset, options.directory, options.num, fps, progress=update)
    with printing():
        print(f"{counted(options.num, 'video')} and metadata.csv in {folder}")
