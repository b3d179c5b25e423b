"""What others made, checked before anything acts on it: JSON documents and names of files.

All of these raise plain ValueError with the reason; callers say which file it is, and what to do.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

MAX_JSON_BYTES = 64 * 2**20
"""Of a document. The largest in use, tokenizers of 256,000 words, have 35 MB; parsed they take
about ten times that."""
MAX_JSON_DEPTH = 64
"""Levels of lists and objects. Configurations have about five."""
_TOO_DEEP = f"it is nested deeper than {MAX_JSON_DEPTH} levels"


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
