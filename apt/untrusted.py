"""Checks of untrusted input before it is used: JSON, names, links, safetensors headers.

Checks of JSON and names raise plain ValueError with the reason, and callers add the file's name.
Checks of links and headers raise CheckpointError.

The safetensors library also checks most of a header when it maps a file. Here the check comes
before an untrusted header decides how much memory to allocate, and its messages say what is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from apt.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20
"""Size limit of a document. The largest in use, tokenizers of 256,000 words, have 35 MB, and take
about ten times as much memory when parsed."""
MAX_JSON_DEPTH = 64
"""Nesting limit of lists and objects. Configurations have about five levels."""
_TOO_DEEP = f"it is nested deeper than {MAX_JSON_DEPTH} levels"

_MAX_HEADER = 32 * 2**20
"""Bytes. A header of 1,000 tensors has a tenth of a megabyte; the format allows 100 megabytes."""
_MAX_DIMENSIONS = 16

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits per value. For other types, the library checks the length when it reads the tensor."""


def parse_json(text: str | bytes, *, limit: int = MAX_JSON_BYTES, unique_keys: bool = False) -> Any:
    """Parse a JSON text.

    Raises ValueError if it is not UTF-8 or not JSON, has more than `limit` bytes, or nests deeper
    than `MAX_JSON_DEPTH`; with `unique_keys` also if an object has a key twice, because readers
    differ in which of the two they take.
    """
    if len(text) > limit:
        raise ValueError(f"it is larger than {limit / 2**20:g} MB")
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    return value


def read_json_file(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises OSError if it cannot be read, and ValueError as `parse_json` does. A file that is too
    large is not read to its end.
    """
    with path.open("rb") as stream:
        return parse_json(stream.read(limit + 1), limit=limit)


def check_name(name: object) -> str:
    """Return `name` if it is a relative path with "/" that stays in its folder on every system.

    Raises ValueError if it is absolute or empty, is not text, or has "..", a backslash, a drive
    letter or a control character in it.
    """
    if not isinstance(name, str) or not name or name != name.strip():
        raise ValueError(f"{name!r} is not a file name")
    if any(ord(letter) < 32 or letter in "\\\x7f" for letter in name):
        raise ValueError(f"{name!r} contains a backslash or a control character")
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or any(PureWindowsPath(part).drive for part in parts):
        raise ValueError(f"{name!r} is an absolute path")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} leads out of its folder")
    return name


def is_inside(path: Path, *folders: Path) -> bool:
    """Return whether a path, with all links resolved, is one of the folders or inside one."""
    real = path.resolve()
    return any(real.is_relative_to(folder.resolve()) for folder in folders)


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raise CheckpointError if a file is a link to a place outside the folder.

    Two kinds of links are allowed: those of a snapshot in the Hub's cache to the blobs of its
    repository, and links to valid safetensors files, because large weights may be stored elsewhere.
    """
    blobs = [folder.parents[1] / "blobs"] if is_snapshot(folder) else []
    for file in files:
        if is_inside(file, folder, *blobs):
            continue
        if file.suffix == ".safetensors":
            read_entries(file)
            continue
        raise CheckpointError(
            f"{str(file)!r} is a link to {str(file.resolve())!r}, outside its folder; such files "
            "are neither read nor passed on, so replace the link by a copy"
        )


def is_snapshot(folder: Path) -> bool:
    """Return whether a folder is a snapshot in the Hub's cache."""
    return folder.parent.name == "snapshots"


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Read the header of a safetensors file: `dtype`, `shape` and `data_offsets` of each tensor.

    Raises CheckpointError unless the file is safetensors, its tensors follow each other without
    gaps or overlap, each has the length of its shape, and the file ends with the last one.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            header = stream.read(length) if length < min(size, _MAX_HEADER) else b""
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(path)!r} is missing, although its model names it; copy the folder again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if start == b"version ":
        raise CheckpointError(f"{str(path)!r} is a Git LFS pointer; run `git lfs pull` to fetch it")
    if start[:4] == b"PK\x03\x04":
        raise pickle_refusal(path)
    if size < 8 or (0 < length < _MAX_HEADER and len(header) < length):
        raise CheckpointError(
            f"{str(path)!r} is truncated: its {size} bytes are less than its header; copy or "
            "download it again"
        )
    try:
        document = parse_json(header, limit=_MAX_HEADER, unique_keys=True)
        if not isinstance(document, dict):
            raise ValueError("it is not an object")
        entries = {key: entry for key, entry in document.items() if key != "__metadata__"}
        expected = 8 + length + _data_length(entries)
    except ValueError as error:
        # Only now, because 0x80 may also begin a good file, as part of its header's length.
        if start[:1] == b"\x80":
            raise pickle_refusal(path) from error
        reason = f"of {length} bytes is invalid" if not header else f"is damaged: {error}"
        raise CheckpointError(
            f"{str(path)!r} is not a safetensors file, or its header {reason}; copy or download "
            "it again"
        ) from error
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise CheckpointError(
            f"{str(path)!r} is {what}: it has {size} bytes, its header promises {expected}; copy "
            "or download it again"
        )
    return entries


def pickle_refusal(path: Path) -> CheckpointError:
    """Return the error that refuses a pickle."""
    return CheckpointError(
        f"{str(path)!r} is a pickle, which can run code and is never loaded; use the .safetensors "
        "file of the same model, or convert it with save_pretrained(safe_serialization=True)"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _data_length(entries: dict[str, Any]) -> int:
    """Return the bytes of all tensors. Raises ValueError if an entry is invalid or out of place."""
    spans = []
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError(f"{key!r} has no dtype")
        shape = _sizes(entry.get("shape"), f"{key!r} has the shape")
        offsets = _sizes(entry.get("data_offsets"), f"{key!r} lies at")
        if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
            raise ValueError(f"{key!r} has the shape {shape!r:.60} and lies at {offsets!r:.60}")
        bits = _BITS.get(entry["dtype"])
        if bits is not None and math.prod(shape) * bits != 8 * (offsets[1] - offsets[0]):
            raise ValueError(
                f"{key!r} has {offsets[1] - offsets[0]} bytes, which do not fit its shape"
            )
        spans.append((offsets[0], offsets[1], key))
    end = 0
    for begin, stop, key in sorted(spans):
        if begin != end or stop < begin:
            raise ValueError(f"{key!r} overlaps another tensor or leaves a gap")
        end = stop
    return end


def _sizes(value: Any, what: str) -> list[int]:
    if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value):
        return value
    raise ValueError(f"{what} {value!r:.60}")
