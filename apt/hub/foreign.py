"""Files that are no safetensors at all, by how they begin: what they are, and what to use."""

from __future__ import annotations

from pathlib import Path

from apt.errors import CheckpointError

_BEGINNINGS: dict[bytes, str] = {
    b"GGUF": "is a GGUF file, whose quantised blocks are not read here; use the safetensors file "
    "of the same model (bf16, fp16 or fp8)",
    b"<!doctype": "is a web page, not a model: the download was answered with a login or error "
    "page; download it again",
    b"<html": "is a web page, not a model: the download was answered with a login or error page; "
    "download it again",
}


def check_file_kind(path: Path) -> None:
    """Raise CheckpointError for a file of a known other kind. What cannot be read passes: reading
    it says why."""
    try:
        with path.open("rb") as stream:
            start = stream.read(16).lstrip()
    except OSError:
        return
    for beginning, kind in _BEGINNINGS.items():
        if start[: len(beginning)].lower() == beginning.lower():
            raise CheckpointError(f"{str(path)!r} {kind}")
