"""`diffusion-apt pull`: a model from the Hub."""

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
    """Download a model: from the Hub by its id, or published weights by a name of `list models`.

    Prints the folder, which every --model and --stage option takes. Files that are there already
    are not fetched again; an interrupted download goes on with the files that are missing.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """owner/name, owner/name@revision, or a registered model such as wan2.1_t2v_1.3b."""
    revision: str | None = None
    """Commit, tag or branch."""
    local_dir: Path | None = None
    """Folder to put the files into, in place of the Hub's cache."""
    everything: bool = False
    """Also a second expert, which one step does not need but stock diffusers does."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Download, and say where it is."""
    options = parse(Pull, args, prog=prog)

    from apt.checkpoints.source import split_hub_id
    from apt.hub.pull import pull_from_hub

    repo, revision = split_hub_id(options.name) or published(options.name)
    if options.revision is not None and "@" in options.name:
        raise InputError(f"{options.name!r} and --revision name two revisions; leave one out")
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
    """Repository and revision of a registered model's weights. Raises InputError for none."""
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
