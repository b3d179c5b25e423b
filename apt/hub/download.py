"""A Hub repository to a local folder, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apt.errors import CheckpointError


def download(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetch the files of a model repository that match `patterns`; returns the cached folder.

    Files in the cache are not fetched again, and with HF_HUB_OFFLINE=1 nothing is.

    Raises:
        CheckpointError: no such repository or revision, no access, or no connection and no copy.
    """
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
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
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
