"""`diffusion-apt tags`: print how files were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from apt.cli.app import parse
from apt.errors import InputError


@dataclass(frozen=True)
class ReadTags:
    """Print how files were made, as recorded in them: prompt, seed, model and settings.

    `generate` records this in every file, unless it gets --no-tags. The output is one line of JSON
    per file.
    """

    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")]
    """Files that end in .mp4, .mkv, .gif, .webp or .png."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Print the tags of each file."""
    options = parse(ReadTags, args, prog=prog)
    if not options.files:
        raise InputError(f"there is no file to read; name one or more: {prog} FILE")

    from apt.media import read_tags

    for file in options.files:
        print(json.dumps({"file": str(file), **read_tags(file)}, ensure_ascii=False))
