"""`diffusion-apt study serve`: serve the page for raters."""

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
    """Serve a study to raters in their browsers, until interrupted; prints a link for each rater.

    Every answer is on disk before the rater sees the next pair, so the server can be stopped,
    killed and restarted at any time, with the same links. No data leaves this machine except to the
    raters' browsers.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of the study."""
    # Nested, because tyro turns errors of the outermost class into boxes; these pass through.
    config: Annotated[ServeConfig, tyro.conf.arg(name="")]


def main(args: Sequence[str], *, prog: str) -> None:
    """Serve the study and print the links."""
    asked = parse(StudyServe, args, prog=prog)

    def ready(links: Sequence[str]) -> None:
        with printing():
            for rater, link in enumerate(links, 1):
                print(f"rater {rater}: {link}")
            print("Each link is for one person. Press Ctrl-C to stop; answers are already saved.")

    # Service managers stop a process with SIGTERM; handle it like Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    serve_study(asked.directory, asked.config, ready=ready)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
