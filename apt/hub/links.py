"""Links in a model's folder: none may bring a file in from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from apt.errors import CheckpointError
from apt.hub.header import read_entries
from apt.untrusted import is_inside


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raise CheckpointError for a file that is a link out of the folder.

    A snapshot in the Hub's cache consists of links to the blobs of its repository. Large weights
    may lie elsewhere, if that is what they are: safetensors.
    """
    blobs = [folder.parents[1] / "blobs"] if is_snapshot(folder) else []
    for file in files:
        if is_inside(file, folder, *blobs):
            continue
        if file.suffix == ".safetensors":
            read_entries(file)
            continue
        raise CheckpointError(
            f"{str(file)!r} is a link to {str(file.resolve())!r}, out of its folder, and such a "
            "file is neither read nor passed on; put a copy in its place"
        )


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a repository's in the Hub's cache."""
    return folder.parent.name == "snapshots"
