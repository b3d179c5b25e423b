"""`diffusion-apt data check`: a look at a folder before training on it."""

from __future__ import annotations

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

    Counts, resolutions, durations, frame rates, captions, and every file that cannot be used. The
    exit code is 0 if there is no problem.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """It has metadata.csv or metadata.jsonl (file_name, caption), or a .txt beside each file."""
    source: Literal["folder", "webdataset"] = "folder"
    """Files, or WebDataset shards: .tar files with .txt or .json captions, as for train's
    --data.source."""
    headers_only: bool = False
    """Do not decode every frame: fast, but overlooks damage further in."""
    model: str | None = None
    """Look for captions that this model's text encoder refuses, too: a built-in or registered name,
    a folder, or a Hub id. Only its tokenizer is loaded."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Print the report. Raises DataError after it if something is wrong with the folder."""
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
    with printing():
        Console(soft_wrap=True).print(found.render())
    if not found.num_videos + found.num_images:
        raise DataError(f"{options.directory} has nothing to train on; see the report above")
    if found.problems:
        raise DataError(
            f"{len(found.problems)} problems in {options.directory}; mend or remove those files, "
            "or leave them: training skips them and says so"
        )
