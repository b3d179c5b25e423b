"""`diffusion-apt compare`: check that two sets of samples agree, sample by sample."""

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
    """Compare samples with a reference: before and after a change, 8-bit and 16-bit weights, or two
    kernels.

    Takes files, or folders of samples from `diffusion-apt generate`, whose files are paired by
    prompt and seed. The exit code is 0 if the worst pair meets every given limit, and 1 if not.
    """

    reference: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="REFERENCE")]
    """The reference: a file, or a folder of samples."""
    test: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TEST")]
    """The file or folder to compare with it. Lossy files (.mp4) add differences of their own, so
    generate .mkv or .png."""
    measures: tuple[str, ...] = ("psnr", "ssim")
    """psnr, ssim, and with the extra `eval` also flip and cvvdp."""
    min_psnr: float | None = None
    """Lower limit of PSNR, in dB."""
    min_ssim: float | None = None
    """Lower limit of SSIM, at most 1."""
    max_flip: float | None = None
    """Upper limit of FLIP, from 0 (equal) to 1."""
    min_cvvdp: float | None = None
    """Lower limit of ColorVideoVDP in JOD, at most 10; three of four people see a difference of
    1."""
    out: Path | None = None
    """JSON file for the figures of every pair."""


def main(args: Sequence[str], *, prog: str) -> int:
    """Print the figures; return 1 if a limit is missed."""
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
