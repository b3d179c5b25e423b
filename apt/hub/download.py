"""A Hub repository to a local folder: whole files, checked against the Hub's checksums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apt.errors import CheckpointError
from apt.hub.client import explained, progress_class, quiet_client, with_retries
from apt.hub.verify import METADATA, announced_checksum, damaged_files

_ATTEMPTS_AT_CONTENT = 2
VARIANTS = ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*"]
"""Second copies of the same weights in another number type."""


def download(
    repo_id: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    local_dir: str | Path | None = None,
) -> Path:
    """Fetch the files of a model repository that match `patterns`; returns their folder.

    That is a snapshot in the Hub's cache, whose name is the commit, or `local_dir`. Files that are
    there are not fetched again, and with HF_HUB_OFFLINE=1 nothing is. Only whole files appear in
    it, each compared once with the checksum that the Hub gives. Failures that may pass are tried
    again with back-off; several processes may ask for the same files at once.

    Raises:
        CheckpointError: no such repository or revision, no access, no connection and no copy, a
            full disk, or content that is not what the Hub announces.
    """
    # Slow to import, and not needed for anything local.
    from huggingface_hub import snapshot_download

    with quiet_client(), explained("download", repo_id, revision):
        for _ in range(_ATTEMPTS_AT_CONTENT):
            folder = Path(
                with_retries(
                    lambda: snapshot_download(
                        repo_id,
                        revision=revision,
                        allow_patterns=list(patterns),
                        ignore_patterns=VARIANTS,
                        local_dir=local_dir,
                        tqdm_class=progress_class(),
                    )
                )
            )
            damaged = _check(folder, patterns)
            if not damaged:
                return folder
            for name in damaged:
                # The file behind the link too, or it would be taken for good again.
                (folder / name).resolve().unlink()
                (folder / name).unlink(missing_ok=True)
    raise CheckpointError(
        f"cannot download {repo_id!r}: the content of {', '.join(damaged)} is not what the Hub "
        "announces (checksum), twice; a proxy on the way may alter it, try another network"
    )


def _check(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names of files in the folder whose content is not what the Hub announced for them."""
    from huggingface_hub.utils import filter_repo_objects

    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    ]
    chosen = filter_repo_objects(names, allow_patterns=list(patterns), ignore_patterns=VARIANTS)
    expected = {name: sum_ for name in chosen if (sum_ := announced_checksum(folder, name))}
    in_cache = folder.parent.name == "snapshots"
    return damaged_files(
        folder, expected, (folder.parents[1] if in_cache else folder / METADATA) / "apt-verified"
    )
