"""Read results back from their JSON file."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any

from apt.errors import DataError
from apt.evaluate.digits.results import Results
from apt.untrusted import parse_json


def read_results(file: Path) -> Results:
    """Read the figures of an evaluation.

    Raises DataError for a file that is missing, or holds something else.
    """
    try:
        found = _built(Results, parse_json(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(
            f"cannot read {str(file)!r}: {error.strerror or error}; measure first"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{str(file)!r} does not hold figures of this version ({error!r}); measure again"
        ) from error
    assert isinstance(found, Results)
    return found


def _built(kind: Any, value: Any) -> Any:
    """Convert a JSON value to a type; null stands for nan, which JSON does not have."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        unknown = value.keys() - hints.keys()
        if unknown:
            raise ValueError(f"{kind.__name__} has no {sorted(unknown)}")
        return kind(**{name: _built(hints[name], item) for name, item in value.items()})
    if origin is dict:
        return {key: _built(parts[1], item) for key, item in value.items()}
    if origin is list:
        return [_built(parts[0], item) for item in value]
    if origin is tuple:
        return tuple(_built(parts[0], item) for item in value)
    if kind is float:
        return math.nan if value is None else float(value)
    if origin in (typing.Union, types.UnionType) and value is not None:
        return _built(next(part for part in parts if part is not types.NoneType), value)
    return value
