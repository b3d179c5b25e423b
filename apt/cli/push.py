"""`diffusion-apt push`: a model folder to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from apt.cli.app import parse
from apt.errors import InputError


@dataclass(frozen=True)
class Push:
    """Upload a model folder to the Hub, with a model card made from its record of training.

    It takes what `diffusion-apt export` makes: for others to load, use --format diffusers there.
    The token is that of `hf auth login`, or HF_TOKEN.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the model, or of the training run that made it."""
    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """Where to; made if need be."""
    private: bool = False
    """If it is made: for you and your organisation alone."""
    revision: str | None = None
    """Branch, made if need be; None is main."""
    license: str | None = None
    """For the card; None carries over that of the base model."""
    message: str = "Upload by diffusion-apt"
    """Of the commit."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Upload, and say where it is."""
    options = parse(Push, args, prog=prog)

    from apt.checkpoints.info import CodecInfo, read_description
    from apt.checkpoints.runs import model_folder
    from apt.checkpoints.source import split_hub_id

    if not options.folder.is_dir():
        raise InputError(f"there is no folder {str(options.folder)!r}; pass that of a model")
    hub_id = split_hub_id(options.repo)
    if hub_id is None or hub_id[1] is not None:
        raise InputError(
            f"{options.repo!r} is no name on the Hub; write owner/name, and a branch as --revision"
        )

    from apt.hub.push import push_to_hub
    from apt.models import MODELS

    folder = model_folder(options.folder)
    license = options.license
    if license is None:
        info = read_description(folder)
        architecture = "" if isinstance(info, CodecInfo) else info.model.architecture
        entries = MODELS.pretrained(architecture) if architecture in MODELS.names() else {}
        license = next((entry.license for entry in entries.values()), None)
    print(
        push_to_hub(
            folder,
            options.repo,
            private=options.private,
            revision=options.revision,
            license=license,
            message=options.message,
        )
    )
