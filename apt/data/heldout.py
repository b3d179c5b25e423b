"""Which clips are held out of training: the same ones in every run, whatever its seed.

They are chosen by the names of their files, so that stages in a row hold out the same ones, and all
captions of a file go with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from apt.errors import ConfigError

__all__ = ["Divisible", "hold_out"]

Data = TypeVar("Data", bound="Divisible")


@runtime_checkable
class Divisible(Protocol):
    """A data set that can be had in parts. Index `pass * len + item` is an item in a pass."""

    @property
    def members(self) -> Mapping[Any, list[int]]:
        """Its items by the shape of their clips."""
        ...

    def __len__(self) -> int: ...

    def file_name(self, index: int) -> str:
        """The file of a sample, or another name; samples of one name belong together."""
        ...

    def part(self: Data, items: Collection[int]) -> Data:
        """The same with some of the items alone; an index is the same sample as before."""
        ...


def hold_out(dataset: Data, *, share: float = 0.0, clips: int = 0) -> tuple[Data, Data]:
    """Divide a data set.

    Args:
        dataset: all of it.
        share: of its files that are held out, in (0, 1); or
        clips: how many files.

    Returns:
        What is trained on, and what is held out.

    Raises:
        ConfigError: nothing would be held out, or nothing left.
    """
    items: dict[str, list[int]] = {}
    for item in range(len(dataset)):
        items.setdefault(dataset.file_name(item), []).append(item)
    count = clips or math.ceil(share * len(items))
    if not 0 < count < len(items):
        raise ConfigError(
            f"{count} of {len(items)} files would be held out, which leaves nothing to train on; "
            "choose fewer with --heldout.clips or --heldout.share"
        )
    held = {item for name in sorted(items, key=_place)[:count] for item in items[name]}
    return dataset.part(set(range(len(dataset))) - held), dataset.part(held)


def _place(name: str) -> tuple[bytes, str]:
    return hashlib.sha256(name.encode(errors="backslashreplace")).digest(), name
