"""`diffusion-apt export`: a model folder to keep, from a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from apt.errors import CheckpointError


@dataclass(frozen=True)
class Export:
    """Make a model folder (apt.json and safetensors) from a training run.

    A finished run has one in export/, and one for each update of --snapshot-at in snapshots/; this
    checks it, and writes it elsewhere in the number type you choose.
    """

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write; made if need be."""
    update: int | None = None
    """Take the snapshot of this update; None takes the finished model."""
    weights: Literal["ema", "raw"] = "ema"
    """Of a snapshot: averaged weights, or those that were training."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type in the files."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Load the model strictly, write it, and say where it is."""
    options = tyro.cli(Export, args=args, prog=prog)
    source = find_model(options.run_dir, options.update, options.weights)

    import torch

    from apt.models.bundle import load_pretrained, save_pretrained

    bundle = load_pretrained(source)
    external = bundle.info.text_encoder.weights is None
    dtype = getattr(torch, options.dtype)
    save_pretrained(options.out, bundle, dtype=dtype, external_text_encoder=external)
    print(options.out)


def find_model(run_dir: Path, update: int | None, weights: str) -> Path:
    """The model folder inside a run. Raises CheckpointError that names those there are."""
    snapshots = sorted(
        int(path.parent.name)
        for path in run_dir.glob(f"snapshots/*/{weights}")
        if path.parent.name.isdigit()
    )
    if update is None:
        found, missing = run_dir / "export", "no finished model"
        if weights == "raw":
            raise CheckpointError("raw weights are kept for snapshots only; pass --update")
    else:
        found = run_dir / "snapshots" / str(update) / weights
        missing = f"no {weights} snapshot of update {update}"
    if not found.is_dir():
        raise CheckpointError(
            f"{str(run_dir)!r} has {missing}; "
            + (f"there are snapshots of updates {snapshots}" if snapshots else "let it finish")
        )
    return found
