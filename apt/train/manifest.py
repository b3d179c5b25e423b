"""The manifest of a checkpoint: a JSON file with its contents and the SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from apt.errors import CheckpointError

__all__ = ["check_file", "fingerprint", "read_manifest", "sync_folder", "write_manifest"]

FORMAT = 1
MANIFEST = "manifest.json"


def fingerprint(file: Path) -> dict[str, Any]:
    """Return size in bytes and SHA-256 of a file, as `check_file` expects them."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def check_file(file: Path, expected: dict[str, Any]) -> None:
    """Compare a file with its recorded fingerprint.

    Raises:
        CheckpointError: it is missing, or has another size or other contents.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    size = file.stat().st_size
    if size != expected["size"]:  # cheaper than a hash, and not the same as corruption
        raise CheckpointError(f"{file} has {size} bytes, expected {expected['size']}")
    if fingerprint(file) != expected:
        raise CheckpointError(f"{file} is corrupt: its SHA-256 is not the recorded one")


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `content` and its SHA-256 as the manifest of `folder`, and flush both to disk."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(_encode({**content, "format": FORMAT}))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content that `write_manifest` wrote; any changed byte is an error.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of another format.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint folder")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: not a checkpoint, or an incomplete one")
    try:
        text = file.read_bytes().decode("utf-8")
        content = json.loads(text)["content"]
        intact = _encode(content) == text
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not intact:
        raise CheckpointError(f"{file} is damaged: it does not match its own SHA-256")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {content['format']!r}, but this version reads {FORMAT}"
        )
    return dict(content)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder (names, renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(content: dict[str, Any]) -> str:
    body = json.dumps(content, indent=1, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"content": content, "sha256": seal}, indent=1, sort_keys=True)
