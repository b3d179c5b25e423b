"""`diffusion-apt tags`: how files were made."""

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
    """Print how files were made, as they say themselves: prompt, seed, model and settings.

    `generate` writes it into every file, unless told --no-tags. One line of JSON for each file.
    """

    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")]
    """Of .mp4, .mkv, .gif, .webp or .png."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Print what each file says."""
    options = parse(ReadTags, args, prog=prog)
    if not options.files:
        raise InputError(f"name a file, or several: {prog} FILE")

    from apt.media import read_tags

    for file in options.files:
        print(json.dumps({"file": str(file), **read_tags(file)}, ensure_ascii=False))
