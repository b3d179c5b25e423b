"""`diffusion-apt pull`: download a model from the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from apt.cli.app import parse
from apt.errors import InputError
from apt.outputs import check_folder


@dataclass(frozen=True)
class Pull:
    """Download a model by its Hub id, or published weights by a name of `list models`.

    Prints the folder, which can be passed to every --model and --stage option. Existing files are
    not downloaded again, so an interrupted download continues with the missing ones.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """owner/name, owner/name@revision, or a registered model such as wan2.1_t2v_1.3b."""
    revision: str | None = None
    """Commit, tag or branch."""
    local_dir: Path | None = None
    """Folder to download to, instead of the Hub's cache."""
    everything: bool = False
    """Also download a second expert, which stock diffusers needs but one-step models do not."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Download the model and print its folder."""
    options = parse(Pull, args, prog=prog)

    from apt.checkpoints.source import split_hub_id
    from apt.hub.pull import pull_from_hub

    repo, revision = split_hub_id(options.name) or published(options.name)
    if options.revision is not None and "@" in options.name:
        raise InputError(f"{options.name!r} and --revision both name a revision; leave one out")
    if options.local_dir is not None:
        check_folder(options.local_dir)
    print(
        pull_from_hub(
            repo,
            options.revision or revision,
            local_dir=options.local_dir,
            everything=options.everything,
        )
    )


def published(name: str) -> tuple[str, str | None]:
    """Return repository and revision of a model's published weights. Raises InputError if none."""
    from apt.checkpoints.source import is_here
    from apt.models.architectures import MODELS, find_tag, split_tag

    architecture, tag = split_tag(name)
    if architecture not in MODELS.names() and is_here(name):
        raise InputError(
            f"{name!r} is here already, and every --model and --stage option takes it so; pull "
            "takes the name of a model on the Hub (owner/name), or one of `list models`"
        )
    entry = MODELS.pretrained(architecture)[find_tag(architecture, tag or True)]
    return entry.repo, entry.revision
