"""From the name of a model to a folder: built-in names, folders, Hub ids."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from apt.errors import CheckpointError
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
    """Fetch the three files of a Hub repository into its cache."""
    # Slow to import, and not needed for anything local.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = repr(repo_id if revision is None else f"{repo_id}@{revision}")
    try:
        # Exact names: a foreign repository must not be fetched whole to find that it is one.
        files = [INFO_FILE, TRANSFORMER_FILE, TEXT_ENCODER_FILE]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    # Derives from RepositoryNotFoundError, so it comes first.
    except GatedRepoError as error:
        reason = "access is gated: accept its terms on the Hub, then run `hf auth login`"
        raise CheckpointError(f"cannot download {name}: {reason}") from error
    except RepositoryNotFoundError as error:
        reason = (
            "there is no folder of that name, and the Hub has no such model, or it is private "
            "(run `hf auth login`)"
        )
        raise CheckpointError(f"cannot load {name}: {reason}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"the Hub model {repo_id!r} has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, IncompleteSnapshotError) as error:
        reason = (
            "there is no folder of that name, the Hub cannot be reached, and it is not in the "
            "local cache"
        )
        raise CheckpointError(f"cannot load {name}: {reason}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{name} is neither a folder nor a Hub id: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"cannot download {name}: {error}; try again") from error
    if not (folder / INFO_FILE).is_file():
        raise CheckpointError(
            f"the Hub model {name} has no {INFO_FILE}, so it is not a model of this package"
        )
    return folder
