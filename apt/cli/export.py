"""`diffusion-apt export`: from a training run to a model that others can load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from apt.checkpoints.runs import is_model, model_folder, snapshot_folder
from apt.checkpoints.source import ASSETS, list_pretrained
from apt.cli.app import parse
from apt.device import explained_memory
from apt.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Export:
    """Write a model for this package, for diffusers or for ComfyUI.

    A finished run has a model in export/, and one for each update of --snapshot-at in snapshots/;
    this checks it, and writes it elsewhere in the layout and number type that you choose.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """Folder of a training run, or of a model; or a built-in model by its name."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write, made if need be; for comfyui a file that ends in .safetensors."""
    format: Literal["apt", "diffusers", "comfyui"] = "apt"
    """apt: apt.json and safetensors. diffusers: a whole pipeline that runs in stock diffusers with
    one step. comfyui: the diffusion model in one file, in its authors' layout."""
    update: int | None = None
    """Take the snapshot of this update; None takes the finished model, or the last snapshot."""
    weights: Literal["ema", "raw"] = "ema"
    """Of a snapshot: averaged weights, or those that were training."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type in the files."""
    base: str | None = None
    """For diffusers: the pipeline (folder or Hub id) that text encoders and VAE are copied from;
    None is where this model's VAE comes from."""
    max_shard_size: str = "5GB"
    """For diffusers: the largest file of the transformer."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Load the model strictly, write it, and say where it is."""
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
    """The model folder itself, or the one of a run.

    Raises CheckpointError for a run without such a model, naming those there are, and InputError
    for a choice among snapshots where there are none to choose from.
    """
    if str(folder) in list_pretrained():
        folder = ASSETS / folder
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r}; pass that of a run or a model")
    if is_model(folder):
        if update is not None or weights != "ema":
            raise InputError(
                "--update and --weights choose among the snapshots of a run, and "
                f"{str(folder)!r} is a model; leave them out"
            )
        return folder
    if update is not None:
        return snapshot_folder(folder, update, weights)
    if weights == "raw":
        raise CheckpointError("raw weights are kept for snapshots only; pass --update")
    return model_folder(folder)
