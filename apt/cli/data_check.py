"""`diffusion-apt data check`: check a folder before training on it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from apt.cli.app import parse
from apt.cli.output import printing
from apt.cli.progress import progress_bar
from apt.errors import DataError


@dataclass(frozen=True)
class DataCheck:
    """Report what is in a folder of captioned videos and images, and what is broken.

    The report has counts, resolutions, durations, frame rates and captions, names every file that
    cannot be used, and shows the clips that `train own` would take. The exit code is 0 if there are
    no problems.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder with a metadata.csv or metadata.jsonl (file_name, caption), or a .txt beside each
    file."""
    source: Literal["folder", "webdataset"] = "folder"
    """What DIR holds, as for train's --data.source: files, or WebDataset shards (.tar files with
    .txt or .json captions)."""
    headers_only: bool = False
    """Read only the headers: faster, but finds no damage in the frames."""
    model: str | None = None
    """Also find captions that this model's text encoder rejects: a built-in or registered name, a
    folder, or a Hub id. Only its tokenizer is loaded."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Print the report, then raise DataError if the folder has problems."""
    options = parse(DataCheck, args, prog=prog)

    from rich.console import Console

    from apt.data.builtin_sources import Folder, Shards
    from apt.data.check import check_folder

    captions = None
    if options.model is not None:
        from apt.checkpoints.load import load_prompt_check
        from apt.data.captions import CaptionRule

        captions = CaptionRule(load_prompt_check(options.model))
    with progress_bar("checking") as update:
        found = check_folder(
            options.directory,
            decode=not options.headers_only,
            captions=captions,
            progress=update,
            scan=Shards.scan if options.source == "webdataset" else Folder.scan,
        )
    usable = found.num_videos + found.num_images
    with printing():
        Console(soft_wrap=True).print(found.render())
        if usable:
            print(for_own_recipe(options.directory, options.source))
    if not usable:
        raise DataError(f"{options.directory} has nothing to train on; see the report above")
    if found.problems:
        raise DataError(
            f"{len(found.problems)} problems in {options.directory}; fix or remove those files, or "
            "keep them: training skips them and reports it"
        )


def for_own_recipe(directory: Path, source: str) -> str:
    """Return the clips that `train own` takes from a folder, for each size of its model."""
    from apt.data.builtin_sources import Files
    from apt.data.statistics import read_statistics
    from apt.train.config import TrainConfig
    from apt.train.recipes import RECIPES
    from apt.train.resolve import clips_of

    of_source = "" if source == "folder" else f" --data.source {source}"
    command = f"train own{of_source} --data.path {shlex.quote(str(directory))}"
    files = None
    lines = []
    for size in ("tiny", "mini", "small"):
        config = RECIPES.create("own_codec", size=size)
        assert isinstance(config, TrainConfig)
        data = dataclasses.replace(config.data, source=source, path=str(directory))
        reader = data.make_source()
        assert isinstance(reader, Files)
        try:
            files = files or read_statistics(directory, captioned=False, scan=reader.scan)
            clip = clips_of(dataclasses.replace(config, data=data), files)
        except DataError as error:
            lines.append(f"  --size {size}: {error}")
        else:
            frames = f"{clip.frames} frames" if clip.frames > 1 else "images"
            rate = f", at {clip.fps:g} fps" if clip.frames > 1 else ""
            lines.append(
                f"  --size {size}: {frames} of {clip.height}x{clip.width} (height x width){rate}"
            )
    return "\n".join(
        [f"clips that `{command}` takes (options such as --data.frames change them):", *lines]
    )
