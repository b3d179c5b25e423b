"""From the name of a model to a folder: built-in names, folders, Hub ids."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from apt.errors import CheckpointError
from apt.hub.download import download
from apt.hub.info import INFO_FILE, TEXT_ENCODER_FILE, TRANSFORMER_FILE

ASSETS = Path(__file__).parents[1] / "assets"


def list_pretrained() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{INFO_FILE}"))


def resolve(name_or_folder: str | Path) -> Path:
    """The folder that a name means; a Hub repository is downloaded (its safetensors only).

    A built-in name wins over a folder of the same name, which "./name" reaches.
    """
    name = str(name_or_folder)
    if isinstance(name_or_folder, str) and name in list_pretrained():
        return ASSETS / name
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name!r} is a file; pass the folder that holds {INFO_FILE}")
    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", name)
    if isinstance(name_or_folder, str) and hub_id:
        return _download(hub_id[1], hub_id[2])
    builtin = list_pretrained()
    close = difflib.get_close_matches(name, builtin, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CheckpointError(
        f"there is no model {name!r}: {hint}It can be a built-in name "
        f"({', '.join(builtin) or 'none is installed'}), an existing folder with {INFO_FILE}, or a "
        "Hub id (owner/name)"
    )


def _download(repo_id: str, revision: str | None) -> Path:
    """Fetch the files of one of our models from the Hub into its cache."""
    # Exact names: a foreign repository must not be fetched whole to find that it is one.
    folder = download(repo_id, revision, [INFO_FILE, TRANSFORMER_FILE, TEXT_ENCODER_FILE])
    if not (folder / INFO_FILE).is_file():
        raise CheckpointError(
            f"the Hub model {repo_id!r} has no {INFO_FILE}, so it is not a model of this package"
        )
    return folder
