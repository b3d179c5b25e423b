"""Download a Hub repository to a folder: complete files, checked against the Hub's checksums."""

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
"""Further copies of the same weights in another dtype."""

METADATA = Path(".cache/huggingface")
"""Where huggingface_hub keeps metadata in a folder that is not its cache."""

_CHUNK = 1 << 20


def download(
    repo_id: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    local_dir: str | Path | None = None,
) -> Path:
    """Download the files of a model repository that match `patterns`; return their folder.

    The folder is `local_dir`, or a snapshot in the Hub's cache, named by its commit. Files that
    exist there are not downloaded again; with HF_HUB_OFFLINE=1 nothing is downloaded. Only complete
    files appear in the folder, and each is checked once against the Hub's checksum. Temporary
    failures are retried with back-off. Several processes may download the same files at once. If
    the Hub does not answer and a copy is on the disk, that copy is used, with a warning.

    Raises:
        CheckpointError: for a missing repository or revision, no access, no connection and no copy,
            a full disk, file names that lead out of the folder, or content that does not match the
            Hub's checksum.
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
                # Also delete the file that the link points to, or it would be used again.
                (folder / name).resolve().unlink()
                (folder / name).unlink(missing_ok=True)
    raise CheckpointError(
        f"cannot download {repo_id!r}: the content of {', '.join(damaged)} differs from the Hub's "
        "checksum, twice; a proxy on the way may change it: try another network"
    )


def find_commit(repo_id: str, revision: str | None, local_dir: str | Path | None) -> str | None:
    """Return the commit that a branch or tag (None: main) names now, for several downloads of it.

    If the Hub does not answer and there is a copy, which `download` would use, this is `revision`.

    Raises:
        CheckpointError: for a missing repository or revision, no access, or no connection.
    """
    from huggingface_hub import HfApi, constants

    def ask() -> str | None:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        return HfApi().repo_info(repo_id, revision=revision, timeout=timeout).sha

    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return revision
    with quiet_client(), explained("download", repo_id, revision):
        copy = _copy_on_disk(repo_id, {"revision": revision, "local_dir": local_dir})
        return revision if copy and not hub_answers(repo_id) else with_retries(ask)


def _fetch(repo_id: str, options: dict[str, Any]) -> Path:
    """Return the folder, fetched from the Hub or, if that does not answer, as it is on the disk."""
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
    """Return the names of files in the folder whose content differs from the Hub's checksum."""
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
    """Return the checksum (ETag) that the Hub gave for a downloaded file, as recorded then.

    In the cache, it is the name of the file that a snapshot links to. None if nothing is recorded:
    the file did not come from the Hub, or the file system has no links.
    """
    note = folder / METADATA / "download" / f"{name}.metadata"
    if note.is_file():
        etag = [*note.read_text().splitlines(), "", ""][1]
    else:
        etag = (folder / name).resolve().name
    return etag if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag) else None


def file_digest(path: Path, expected: str) -> str:
    """Return the checksum of a file, of the same kind as `expected`.

    64 digits are the SHA-256 of the content (files in Git LFS or Xet); 40 digits are the SHA-1 of a
    Git blob (small files).
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
    """Return the names of files that do not match their checksum.

    Files that passed before and have not changed since are not read again.

    Args:
        folder: folder of the files.
        expected: checksum of each file to check, by name.
        record: folder that remembers which files passed. It only saves time: if it cannot be
            written, the files are checked every time.
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
        # A shared cache may be read-only, and a full disk must not undo a good download.
        with suppress(OSError):
            note.unlink(missing_ok=True)
