"""A Hub repository to a local folder: whole files, checked against the Hub's checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from apt.errors import CheckpointError
from apt.hub.client import explained, progress_class, quiet_client, with_retries
from apt.hub.reach import PATIENCE, bounded_waits, hub_answers, tell_of_cache
from apt.untrusted import check_links, is_snapshot

_ATTEMPTS_AT_CONTENT = 2
VARIANTS = ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*"]
"""Second copies of the same weights in another number type."""

METADATA = Path(".cache/huggingface")
"""Where huggingface_hub keeps notes in a folder that is not its cache."""

_CHUNK = 1 << 20


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


def announced_checksum(folder: Path, name: str) -> str | None:
    """What the Hub gave as the checksum (its ETag) of a downloaded file, as it was noted then.

    In the cache it is the name of the file that a snapshot links to. None if there is no such
    note: the file did not come from the Hub, or the system has no links.
    """
    note = folder / METADATA / "download" / f"{name}.metadata"
    if note.is_file():
        etag = [*note.read_text().splitlines(), "", ""][1]
    else:
        etag = (folder / name).resolve().name
    return etag if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag) else None


def file_digest(path: Path, expected: str) -> str:
    """The checksum of a file in the scheme of `expected`.

    64 digits are the SHA-256 of the content (files in Git LFS or Xet), 40 are Git's own SHA-1 of a
    blob (small files).
    """
    if len(expected) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def damaged_files(folder: Path, expected: Mapping[str, str], record: Path) -> list[str]:
    """The files whose content is not what the Hub has, of those that were not checked before.

    Args:
        folder: of the snapshot.
        expected: checksum by name of the files to check.
        record: folder that remembers which files were found good. It is a note for speed: where it
            cannot be written, the files are checked each time.
    """
    damaged = []
    for name, checksum in expected.items():
        path = folder / name
        note = record / checksum
        state = path.stat()
        stamp = f"{state.st_size} {state.st_mtime_ns}"
        if note.is_file() and note.read_text() == stamp:
            continue
        if file_digest(path, checksum) == checksum:
            _remember(note, stamp)
        else:
            damaged.append(name)
    return damaged


def _remember(note: Path, stamp: str) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(stamp)
    except OSError:
        # A cache that others own may be read-only, and a full disk must not undo a good download.
        with suppress(OSError):
            note.unlink(missing_ok=True)
