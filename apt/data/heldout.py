"""Which clips are held out of training: the same ones in every run, whatever its seed.

They are chosen by the names of their files alone, so that all captions of a file go with it, and
stages in a row hold out the same ones, also where one of them leaves out files that another reads.
"""

from __future__ import annotations

import hashlib
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
        share: about which share of its files is held out, in (0, 1): each by itself; or
        clips: how many files, those that a smaller share would take first.

    Returns:
        What is trained on, and what is held out.

    Raises:
        ConfigError: nothing would be held out, or nothing left.
    """
    items: dict[str, list[int]] = {}
    for item in range(len(dataset)):
        items.setdefault(dataset.file_name(item), []).append(item)
    chosen = [name for name in items if _place(name) < share]
    if clips:
        chosen = sorted(items, key=_place)[:clips]
    if not 0 < len(chosen) < len(items):
        raise ConfigError(
            f"{len(chosen)} of {len(items)} files would be held out, which leaves nothing to "
            f"{'train on' if chosen else 'measure'}; choose another --heldout.share, or say how "
            "many with --heldout.clips"
        )
    held = {item for name in chosen for item in items[name]}
    return dataset.part(set(range(len(dataset))) - held), dataset.part(held)


def _place(name: str) -> float:
    """Where a name lies in [0, 1), as if it were drawn."""
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
