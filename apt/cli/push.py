"""`diffusion-apt push`: upload a model folder to the Hub."""

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
    """Upload a model folder to the Hub, with a model card made from its training record.

    The folder is one that `diffusion-apt export` wrote. With --format diffusers there, others can
    load it in diffusers. The token is that of `hf auth login`, or HF_TOKEN.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the model, or of the training run that made it."""
    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """Repository to upload to, created if missing."""
    private: bool = False
    """If the repository is created, make it private."""
    revision: str | None = None
    """Branch, created if missing; None is main."""
    license: str | None = None
    """License in the model card; None is that of the base model."""
    message: str = "Upload by diffusion-apt"
    """Commit message."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Upload the model and print its address."""
    options = parse(Push, args, prog=prog)

    from apt.checkpoints.info import CodecInfo, read_description
    from apt.checkpoints.runs import model_folder
    from apt.checkpoints.source import split_hub_id

    if not options.folder.is_dir():
        raise InputError(f"there is no folder {str(options.folder)!r}; pass the folder of a model")
    hub_id = split_hub_id(options.repo)
    if hub_id is None or hub_id[1] is not None:
        raise InputError(
            f"{options.repo!r} is not a name on the Hub; write owner/name, and pass a branch with "
            "--revision"
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
