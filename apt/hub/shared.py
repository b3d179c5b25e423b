"""What others get to read of a model's record: nothing of the machine that it was made on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.hub.info import ModelInfo

_FOLDERS = ("run_dir", "path")
"""Fields of a training configuration that are always folders."""
_MODELS = ("source", "teacher", "generator", "discriminator")
"""Fields that name a model: built-in or registered, of the Hub, or a folder."""


def without_folders(info: ModelInfo) -> ModelInfo:
    """The same with an empty text where the record of training names a folder of this machine.

    A name of one slash that is no folder here is taken for a Hub id, and stays.
    """
    return dataclasses.replace(info, training=_cleared(info.training))


def _cleared(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: "" if _names_folder(key, entry) else _cleared(entry)
            for key, entry in value.items()
        }
    return value


def _names_folder(key: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    if key in _FOLDERS:
        return True
    return key in _MODELS and (
        value.startswith(("~", "."))
        or value.count("/") > 1
        or Path(value).is_absolute()
        or ("/" in value and Path(value).is_dir())
    )
