"""What others made, checked before anything acts on it: JSON, names, links, safetensors headers.

JSON and names raise plain ValueError with the reason, and callers say which file it is; links and
headers raise CheckpointError.

The safetensors library checks most of a header too, when it maps a file; here it comes first,
before a header of others decides how much memory is taken, and says what is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from apt.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20
"""Of a document. The largest in use, tokenizers of 256,000 words, have 35 MB; parsed they take
about ten times that."""
MAX_JSON_DEPTH = 64
"""Levels of lists and objects. Configurations have about five."""
_TOO_DEEP = f"it is nested deeper than {MAX_JSON_DEPTH} levels"

_MAX_HEADER = 32 * 2**20
"""Bytes. A header of 1,000 tensors has a tenth of a megabyte; the format allows 100."""
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
"""Of one value. Of a type that is not here, the library checks the length when it reads it."""


def parse_json(text: str | bytes, *, limit: int = MAX_JSON_BYTES, unique_keys: bool = False) -> Any:
    """The value of a JSON text.

    Raises ValueError if it is no UTF-8 or no JSON, has more than `limit` bytes, or nests deeper
    than `MAX_JSON_DEPTH`; with `unique_keys` also if an object has a key twice, of which readers
    take one or the other.
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
    """The value of a JSON file.

    Raises OSError if it cannot be read, ValueError as `parse_json`; a file that is too large is
    not read to its end.
    """
    with path.open("rb") as stream:
        return parse_json(stream.read(limit + 1), limit=limit)


def check_name(name: object) -> str:
    """A relative path with "/" that stays in its folder on every system.

    Raises ValueError for an absolute one, one with "..", a backslash, a drive letter or a control
    character, an empty one, or what is no text.
    """
    if not isinstance(name, str) or not name or name != name.strip():
        raise ValueError(f"{name!r} is no name of a file")
    if any(ord(letter) < 32 or letter in "\\\x7f" for letter in name):
        raise ValueError(f"{name!r} has a backslash or a control character in it")
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or any(PureWindowsPath(part).drive for part in parts):
        raise ValueError(f"{name!r} is an absolute path")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} leads out of its folder")
    return name


def is_inside(path: Path, *folders: Path) -> bool:
    """Whether a path, with all links followed, is in one of the folders, or is one of them."""
    real = path.resolve()
    return any(real.is_relative_to(folder.resolve()) for folder in folders)


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raise CheckpointError for a file that is a link out of the folder.

    A snapshot in the Hub's cache consists of links to the blobs of its repository. Large weights
    may lie elsewhere, if that is what they are: safetensors.
    """
    blobs = [folder.parents[1] / "blobs"] if is_snapshot(folder) else []
    for file in files:
        if is_inside(file, folder, *blobs):
            continue
        if file.suffix == ".safetensors":
            read_entries(file)
            continue
        raise CheckpointError(
            f"{str(file)!r} is a link to {str(file.resolve())!r}, out of its folder, and such a "
            "file is neither read nor passed on; put a copy in its place"
        )


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a repository's in the Hub's cache."""
    return folder.parent.name == "snapshots"


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of its tensors, by key: `dtype`, `shape` and `data_offsets`.

    Raises CheckpointError unless it is safetensors, its tensors lie one behind another without gap
    or overlap, each as long as its shape, and the file is as long as they are.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            header = stream.read(length) if length < min(size, _MAX_HEADER) else b""
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(path)!r} is missing, though its model names it; copy the folder again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if start == b"version ":
        raise CheckpointError(f"{str(path)!r} is a Git LFS pointer; run `git lfs pull` to fetch it")
    if start[:4] == b"PK\x03\x04":
        raise pickle_refusal(path)
    if size < 8 or (0 < length < _MAX_HEADER and len(header) < length):
        raise CheckpointError(
            f"{str(path)!r} is truncated: {size} bytes are not even its header; copy or download "
            "it again"
        )
    try:
        document = parse_json(header, limit=_MAX_HEADER, unique_keys=True)
        if not isinstance(document, dict):
            raise ValueError("it is no object")
        entries = {key: entry for key, entry in document.items() if key != "__metadata__"}
        expected = 8 + length + _data_length(entries)
    except ValueError as error:
        # Only now: 0x80 is also a possible first byte of a good file, whose header length it is.
        if start[:1] == b"\x80":
            raise pickle_refusal(path) from error
        reason = f"of {length} bytes is not one" if not header else f"is damaged: {error}"
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
    """The error for a pickle."""
    return CheckpointError(
        f"{str(path)!r} is a pickle, which can run code and is never loaded; take the .safetensors "
        "of the same model, or convert it with save_pretrained(safe_serialization=True)"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
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
    """Bytes of all tensors. Raises ValueError unless each is described, and follows the last."""
    spans = []
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError(f"{key!r} has no type")
        shape = _sizes(entry.get("shape"), f"{key!r} has the shape")
        offsets = _sizes(entry.get("data_offsets"), f"{key!r} lies at")
        if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
            raise ValueError(f"{key!r} has the shape {shape!r:.60} and lies at {offsets!r:.60}")
        bits = _BITS.get(entry["dtype"])
        if bits is not None and math.prod(shape) * bits != 8 * (offsets[1] - offsets[0]):
            raise ValueError(f"{key!r} has {offsets[1] - offsets[0]} bytes, which is not its shape")
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
