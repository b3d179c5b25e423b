"""JSON of pulled models, made inert: what names code is refused, what chooses it is dropped.

The configurations of transformers and diffusers can name Python modules, repositories of code, and
implementations that are fetched from one: CVE-2026-4372, CVE-2026-5241 and CVE-2026-44513 are three
ways in which such code ran though nobody had allowed it. The models here need none of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.errors import CheckpointError
from apt.untrusted import read_json_file

_CODE = re.compile(r"_*(auto_map|trust_remote_code|custom_(pipeline|generate|code|module|class)s?)")
"""Keys that name code, or allow it."""

_IMPLEMENTATION = re.compile(r"implementation|kernel|att(entio)?n_backend")
"""Keys that choose which code computes. That is chosen here."""

_LIBRARIES = ("diffusers", "transformers")
"""Where the classes of a pipeline's parts may come from."""


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object, as it is.

    Raises CheckpointError for a file that is missing, unreadable, damaged, too large or too deep,
    or another value.
    """
    try:
        document = read_json_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path)!r} is missing; copy or download the folder") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r} is not valid JSON ({error}); the file is damaged, copy it again"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{str(path)!r} must hold a JSON object, got {document!r:.80}")
    return document


def read_json(path: Path) -> dict[str, Any]:
    """A configuration, without the keys that choose an implementation.

    Raises CheckpointError as `read_document`, and for one that names code or a repository of code.
    """
    return inert(read_document(path), str(path))


def inert(document: Mapping[str, Any], file: str) -> dict[str, Any]:
    """A configuration without the keys that choose an implementation.

    Raises CheckpointError, which names the file and the key, for one that names code.
    """
    return _inert(document, file, "")


def read_pipeline(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A `model_index.json`, and the names of its parts, which are folders beside it.

    Raises CheckpointError as `read_json`; also for a part whose name can be no such folder, or
    whose class is of another library than diffusers and transformers.
    """
    index = read_json(path)
    parts = []
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
            continue
        if value[0] not in _LIBRARIES:
            raise refusal(str(path), name, value)
        if not name.isidentifier():
            raise CheckpointError(
                f"{str(path)!r} has a part {name!r}, which is no name of a folder beside it"
            )
        parts.append(name)
    return index, parts


def refusal(file: str, key: str, value: Any) -> CheckpointError:
    """The error for a file that names code."""
    return CheckpointError(
        f"{file!r} names code, or a repository of code, under {key!r} ({json.dumps(value)[:80]}); "
        "code of models is never run: use a model without, or delete that key if you have read it"
    )


def _inert(value: Any, file: str, place: str) -> Any:
    if isinstance(value, list):
        return [_inert(entry, file, place) for entry in value]
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, entry in value.items():
        where, name = f"{place}.{key}" if place else key, key.lower()
        chooses = _IMPLEMENTATION.search(name) is not None and not _is_size(entry)
        if _names_code(name, entry) or (chooses and "/" in json.dumps(entry)):
            raise refusal(file, where, entry)
        if not chooses and not _CODE.fullmatch(name):
            kept[key] = _inert(entry, file, where)
    return kept


def _names_code(name: str, entry: Any) -> bool:
    if name == "_class_name":
        # A list of two is a module beside the file, and a class in it.
        return entry is not None and not (isinstance(entry, str) and entry.isidentifier())
    return _CODE.fullmatch(name) is not None and bool(entry)


def _is_size(entry: Any) -> bool:
    """Convolutions have kernels too."""
    return re.fullmatch(r"[\d\s.,\[\]-]+", json.dumps(entry)) is not None
