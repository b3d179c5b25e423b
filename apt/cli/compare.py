"""`diffusion-apt compare`: two runs of one model, sample by sample, as a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from apt.cli.app import parse
from apt.cli.output import printing
from apt.cli.progress import progress_bar

FAILED = 1
"""Exit code if a limit is missed."""


@dataclass(frozen=True)
class Compare:
    """Measure samples against those that they should equal: before and after a change, in 8 bits
    and in 16, through one kernel and another.

    Files, or folders of samples of `diffusion-apt generate`, which are paired by prompt and seed.
    The exit code is 0 if the worst pair reaches every limit that is given, and 1 if not.
    """

    reference: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="REFERENCE")]
    """What is right: a file, or a folder of samples."""
    test: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TEST")]
    """What is looked at. Lossy files (.mp4) add their own differences: generate .mkv or .png."""
    measures: tuple[str, ...] = ("psnr", "ssim")
    """psnr, ssim, and with the extra `eval` flip and cvvdp."""
    min_psnr: float | None = None
    """dB."""
    min_ssim: float | None = None
    """At most 1."""
    max_flip: float | None = None
    """From 0, equal, to 1."""
    min_cvvdp: float | None = None
    """JOD, at most 10; 1 less is seen by three of four people."""
    out: Path | None = None
    """A JSON file for the figures of every pair."""


def main(args: Sequence[str], *, prog: str) -> int:
    """Print the figures; returns 1 if a limit is missed."""
    asked = parse(Compare, args, prog=prog)

    from apt.evaluate.compare import compare
    from apt.outputs import check_place

    if asked.out is not None:
        check_place(asked.out)
    limits = {
        "psnr": asked.min_psnr,
        "ssim": asked.min_ssim,
        "flip": asked.max_flip,
        "cvvdp": asked.min_cvvdp,
    }
    with progress_bar("comparing") as update:
        found = compare(
            asked.reference,
            asked.test,
            measures=asked.measures,
            limits={name: limit for name, limit in limits.items() if limit is not None},
            progress=update,
        )
    if asked.out is not None:
        found.write_json(asked.out)
    with printing():
        print(found.render())
    return FAILED if found.failed else 0
