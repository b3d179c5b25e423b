"""A Hub repository to a local folder: whole files, checked against the Hub's checksums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apt.errors import CheckpointError
from apt.hub.client import explained, progress_class, quiet_client, with_retries
from apt.hub.links import check_links, is_snapshot
from apt.hub.reach import PATIENCE, bounded_waits, hub_answers, tell_of_cache
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
    again with back-off; several processes may ask for the same files at once. A Hub that does not
    answer is not waited for where there is a copy, which is then taken, with a warning.

    Raises:
        CheckpointError: no such repository or revision, no access, no connection and no copy, a
            full disk, names of files that lead elsewhere, or content that is not what the Hub
            announces.
    """
    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(patterns),
        "ignore_patterns": VARIANTS,
        "local_dir": local_dir,
    }
    with quiet_client(), explained("download", repo_id, revision):
        for _ in range(_ATTEMPTS_AT_CONTENT):
            folder = _fetch(repo_id, options)
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


def _fetch(repo_id: str, options: dict[str, Any]) -> Path:
    """The folder with the files, from the Hub or, if it does not answer, as it is on the disk."""
    # Slow to import, and not needed for anything local.
    from huggingface_hub import snapshot_download

    def fetch() -> Path:
        with bounded_waits(PATIENCE):
            return Path(snapshot_download(repo_id, **options, tqdm_class=progress_class()))

    copy = _copy_on_disk(repo_id, options)
    if copy is None or hub_answers(repo_id):
        return with_retries(fetch)
    tell_of_cache(repo_id)
    return copy


def _copy_on_disk(repo_id: str, options: dict[str, Any]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, **options, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _check(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names of files in the folder whose content is not what the Hub announced for them."""
    from huggingface_hub.utils import filter_repo_objects

    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    ]
    chosen = list(
        filter_repo_objects(names, allow_patterns=list(patterns), ignore_patterns=VARIANTS)
    )
    check_links(folder, [folder / name for name in chosen])
    expected = {name: sum_ for name in chosen if (sum_ := announced_checksum(folder, name))}
    record = folder.parents[1] if is_snapshot(folder) else folder / METADATA
    return damaged_files(folder, expected, record / "apt-verified")
