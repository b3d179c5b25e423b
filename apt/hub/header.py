"""The header of a safetensors file: read within bounds, and every byte of the data accounted for.

The safetensors library checks most of this too, when it maps a file; here it comes first, before a
header of others decides how much memory is taken, and says what is wrong.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from apt.errors import CheckpointError
from apt.untrusted import parse_json

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
