"""`diffusion-apt data digits`: write the built-in data set as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from apt.cli.app import parse
from apt.cli.output import printing
from apt.cli.progress import progress_bar


@dataclass(frozen=True)
class DataDigits:
    """Write the built-in moving digits as H.264 .mp4 files with a metadata.csv.

    The clips show real handwriting in colour, moving over real photographs: 9 frames of 32x32 at 8
    frames per second, or 17 of 64x64 at 16 in the large setting. The same seed and split give the
    same clips. An interrupted call can be repeated.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder to write, created if missing."""
    num: int = 1000
    """Number of clips."""
    seed: int = 0
    """Random seed; another seed gives other clips."""
    split: Literal["train", "test", "heldout"] = "train"
    """train; test: handwriting that is never trained on; heldout: also captions that are never
    trained on."""
    setting: Literal["centred", "near", "free", "large"] = "centred"
    """centred: the caption determines where the digit is; free: places and backgrounds vary; near:
    places vary less; large: as free, with twice the size and frame rate."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Write the folder and print its path."""
    options = parse(DataDigits, args, prog=prog)

    from apt.data.digits import MovingDigits, clip_size
    from apt.data.write import write_video_folder

    dataset = MovingDigits(options.seed, options.split, setting=options.setting)
    fps = clip_size(options.setting).fps
    with progress_bar("writing", options.num) as update:
        folder = write_video_folder(dataset, options.directory, options.num, fps, progress=update)
    with printing():
        print(f"{options.num} videos and metadata.csv in {folder}")
