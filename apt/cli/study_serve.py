"""`diffusion-apt study serve`: the page for raters."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro

from apt.cli.app import parse
from apt.cli.output import printing
from apt.study.serve import ServeConfig, serve_study


@dataclass(frozen=True, kw_only=True)
class StudyServe:
    """Show a study to raters in a browser, until interrupted; prints a link for each of them.

    Every answer is on the disk before the rater sees the next pair, so the server can be stopped,
    killed and started again at any time, with the same links. Nothing leaves this machine.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of the study."""
    # Nested, so that its errors come up as they are: of the outermost class the parser makes boxes.
    config: Annotated[ServeConfig, tyro.conf.arg(name="")]


def main(args: Sequence[str], *, prog: str) -> None:
    """Serve and say where."""
    asked = parse(StudyServe, args, prog=prog)

    def ready(links: Sequence[str]) -> None:
        with printing():
            for rater, link in enumerate(links, 1):
                print(f"rater {rater}: {link}")
            print("Each link is for one person. Stop with Ctrl-C; answers are kept as they come.")

    # As systems stop services: the end is the same as of Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    serve_study(asked.directory, asked.config, ready=ready)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
