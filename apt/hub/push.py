"""Push a model folder to the Hub: checked, with a card, in one commit."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from apt.checkpoints.info import (
    INFO_FILE,
    PIPELINE_FILE,
    CodecInfo,
    ComponentInfo,
    ModelInfo,
    info_text,
    read_description,
    without_folders,
)
from apt.checkpoints.reading import read_header
from apt.checkpoints.runs import model_folder
from apt.errors import CheckpointError
from apt.hub.card import CARD_FILE, make_card
from apt.hub.client import explained, quiet_client, require_token, with_retries
from apt.hub.reach import PUSH_PATIENCE, bounded_waits
from apt.untrusted import check_links

_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md", "LICENSE*", "*.png", "*.mp4")
"""The files of a model. Pickles are never pushed."""

_REPLACED = ("*.safetensors", "*.safetensors.index.json")
"""Files of an earlier push that are deleted if the folder lacks them: a loader might use them."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    message: str = "Upload by diffusion-apt",
) -> str:
    """Upload a model folder, with a generated model card unless it has a README.md.

    Everything goes up in one commit, so nobody ever sees half a model. Files that the Hub already
    has are not sent again, and temporary failures are retried. Paths of this machine are removed
    from apt.json.

    Args:
        folder: a model in our layout, an export for diffusers, or a training run, whose model is
            pushed.
        repo_id: "owner/name"; created if needed.
        private: whether a repository that is created is private.
        revision: branch, created if needed; None is main.
        license: licence for the card; None takes that of the base model.
        message: message of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: for a folder without a model, a damaged file, parts that exist only on this
            machine, no token or no write access, or no connection.
    """
    root = model_folder(Path(folder))
    info = without_folders(_check(root))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file()
        and any(fnmatch.fnmatch(path.name, pattern) for pattern in _PATTERNS)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    check_links(root, [root / name for name in names])
    for name in names:
        if name.endswith(".safetensors"):
            read_header(root / name)
    written = {INFO_FILE: info_text(info)}
    if CARD_FILE not in names:
        written[CARD_FILE] = make_card(info, repo_id, root, license=license)
    copied = [name for name in names if name not in written]

    # Slow to import, and not needed for anything local.
    from huggingface_hub import HfApi

    with (
        quiet_client(),
        explained("push to", repo_id, revision),
        bounded_waits(PUSH_PATIENCE),
    ):
        require_token()
        api = HfApi()
        with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None:
            with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        return with_retries(lambda: _commit(root, copied, written, repo_id, revision, message))


def _commit(
    root: Path,
    copied: list[str],
    written: dict[str, str],
    repo_id: str,
    revision: str | None,
    message: str,
) -> str:
    """Commit files of the folder, and texts by file name; return the address of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    there = api.list_repo_files(repo_id, revision=revision)
    stale = [
        name
        for name in there
        if name not in copied and any(fnmatch.fnmatch(name, pattern) for pattern in _REPLACED)
    ]
    # Created anew for each attempt, because operations record how far they got.
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=root / name) for name in copied
    ]
    operations += [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode())
        for name, text in written.items()
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


def _check(root: Path) -> ModelInfo | CodecInfo:
    """Return the description in the folder. Raises CheckpointError if others could not load it."""
    info = read_description(root)
    if isinstance(info, CodecInfo):
        _check_weights(root, info.codec)
        return info
    _check_weights(root, info.model, info.text_encoder, info.codec)
    if (root / PIPELINE_FILE).is_file():
        return info
    for name, part in (("text encoder", info.text_encoder), ("codec", info.codec)):
        repo = part.config.get("repo")
        if isinstance(repo, str) and part.weights is None and Path(repo).expanduser().is_dir():
            raise CheckpointError(
                f"the {name} of {str(root)!r} comes from the folder {repo!r}, which others do not "
                "have; push an export of `diffusion-apt export --format diffusers`, which "
                f"contains it, or set its repo in {INFO_FILE} to a Hub id"
            )
    return info


def _check_weights(root: Path, *parts: ComponentInfo) -> None:
    """Raise CheckpointError if a weights file is missing or damaged."""
    for part in parts:
        if part.weights is not None:
            read_header(root / part.weights)
