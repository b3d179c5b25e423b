"""Downloaded files against the checksums that the Hub gives for them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

METADATA = Path(".cache/huggingface")
"""Where huggingface_hub keeps notes in a folder that is not its cache."""

_CHUNK = 1 << 20


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
