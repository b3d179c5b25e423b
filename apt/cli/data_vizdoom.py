"""`diffusion-apt data vizdoom`: render first-person clips of a moving camera as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from apt.cli.app import parse
from apt.cli.progress import progress_bar


@dataclass(frozen=True)
class DataVizdoom:
    """Render first-person clips as H.264 .mp4 files with a metadata.csv.

    A camera walks and turns through mazes, corridors and halls, at 8.75 frames per second; captions
    say what it does and sees. The same options give the same clips. An interrupted call can be
    repeated. Needs `pip install diffusion-apt[vizdoom]`.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder to write, created if missing."""
    num: int = 1000
    """Number of clips."""
    frames: int = 17
    """Frames per clip."""
    height: int = 64
    """Height in pixels, at most 120."""
    width: int = 64
    """Width in pixels, at most 160."""
    seed: int = 0
    """Random seed; another seed gives other clips."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Render the clips and print their folder."""
    options = parse(DataVizdoom, args, prog=prog)

    from apt.data.doom import FPS, DoomClips
    from apt.data.write import write_video_folder

    size = {"frames": options.frames, "height": options.height, "width": options.width}
    with (
        DoomClips(options.seed, **size) as clips,
        progress_bar("rendering", options.num) as update,
    ):
        folder = write_video_folder(clips, options.directory, options.num, FPS, progress=update)
    print(f"{options.num} videos and metadata.csv in {folder}")
