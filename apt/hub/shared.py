"""What others get to read of a model's record: nothing of the machine that it was made on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from apt.hub.info import CodecInfo, ModelInfo

Info = TypeVar("Info", bound=ModelInfo | CodecInfo)

# Of records that do not say which of their fields are what, from before they did.
_FOLDERS = ("run_dir", "data.path")
_MODELS = ("stage.teacher", "stage.generator", "stage.discriminator")

_PLACE = re.compile(r"[~./\\]|[A-Za-z]:[\\/]|file:")
"""How a place on a machine begins."""


def without_folders(info: Info) -> Info:
    """The same with an empty text where the record of training names a folder of this machine.

    A record says which fields of its configuration hold folders, and which hold models, as the
    method declares them. Whatever the field, a text that looks like a path is taken for one. A name
    of one slash that is no folder here is taken for a Hub id, and stays.
    """
    return dataclasses.replace(info, training=_stage(info.training))


def _stage(record: Mapping[str, Any]) -> dict[str, Any]:
    """One stage of training, and those before it."""
    folders, models = record.get("folders", _FOLDERS), record.get("models", _MODELS)
    cleared = {
        key: _cleared(value, (), ("source",), key)
        for key, value in record.items()
        if key not in ("config", "started_from")
    }
    if "config" in record:
        cleared["config"] = _cleared(record["config"], folders, models, "")
    before = record.get("started_from")
    return cleared if before is None else {**cleared, "started_from": _stage(before)}


def _cleared(value: Any, folders: Collection[str], models: Collection[str], name: str) -> Any:
    """`value` of the option `name`, such as "stage.teacher"."""
    if isinstance(value, Mapping):
        inside = f"{name}." if name else ""
        return {k: _cleared(v, folders, models, f"{inside}{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleared(entry, folders, models, name) for entry in value]
    if isinstance(value, str) and (name in folders or _is_place(value, is_model=name in models)):
        return ""
    return value


def _is_place(value: str, *, is_model: bool) -> bool:
    """Whether a text names a place on this machine."""
    if value.startswith(("https://", "http://")):
        return False
    slashes = value.count("/") + value.count("\\")
    path_like = bool(_PLACE.match(value)) and slashes > 0
    return path_like or slashes > 1 or (is_model and slashes > 0 and Path(value).is_dir())
