"""`diffusion-apt export`: turn a training run into a model that others can load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from apt.checkpoints.runs import is_model, model_folder, snapshot_folder
from apt.cli.app import parse
from apt.device import explained_memory
from apt.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Export:
    """Write a model for this package, for diffusers or for ComfyUI.

    A finished run has a model in export/, and one in snapshots/ for each update of --snapshot-at.
    This command checks such a model and writes it elsewhere, in the layout and data type that you
    choose.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """Folder of a training run or of a model."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write, created if missing; for comfyui, a file that ends in .safetensors."""
    format: Literal["apt", "diffusers", "comfyui"] = "apt"
    """apt: apt.json and safetensors. diffusers: a whole pipeline that runs in stock diffusers with
    one step. comfyui: the diffusion model in one file, in the layout of its authors."""
    update: int | None = None
    """Update whose snapshot to take; None is the finished model, or else the last snapshot."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of a snapshot: averaged (ema), or as trained (raw)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type in the files."""
    base: str | None = None
    """For diffusers: pipeline (folder or Hub id) to copy the text encoders and the VAE from; None
    is the source of this model's VAE."""
    max_shard_size: str = "5GB"
    """For diffusers: maximum size of the transformer's files."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Load the model strictly, write it, and print its path."""
    options = parse(Export, args, prog=prog)
    source = model_to_export(options.source, options.update, options.weights)

    import torch

    from apt.checkpoints.export import export_model

    with explained_memory(f"exporting {str(source)!r}", "export on a machine with more memory"):
        written = export_model(
            source,
            options.out,
            format=options.format,
            dtype=getattr(torch, options.dtype),
            base=options.base,
            max_shard_size=options.max_shard_size,
        )
    print(written)


def model_to_export(folder: Path, update: int | None, weights: str) -> Path:
    """Return the model folder itself, or the chosen one of a run.

    Raises CheckpointError if the run does not have that model, naming those that it has, and
    InputError if a snapshot is chosen but the folder is a model.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {str(folder)!r}; pass the folder of a run or a model"
        )
    if is_model(folder):
        if update is not None or weights != "ema":
            raise InputError(
                "--update and --weights choose among the snapshots of a run, but "
                f"{str(folder)!r} is a model; leave them out"
            )
        return folder
    if update is not None:
        return snapshot_folder(folder, update, weights)
    if weights == "raw":
        raise CheckpointError("only snapshots have raw weights; pass --update")
    return model_folder(folder)
