"""The choice of clips to hold out of training, which is the same in every run and for every seed.

Only the names of the files decide. So all captions of a file stay together, and consecutive stages
hold out the same files, even if one stage skips files that another reads.
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
    """A data set that can be split. Index `pass * len + item` is an item in a pass."""

    @property
    def members(self) -> Mapping[Any, list[int]]:
        """The items by the shape of their clips."""
        ...

    def __len__(self) -> int: ...

    def file_name(self, index: int) -> str:
        """Return a sample's file, or another name. Samples with the same name stay together."""
        ...

    def part(self: Data, items: Collection[int]) -> Data:
        """Return the data set with only these items; an index is the same sample as before."""
        ...


def hold_out(dataset: Data, *, share: float = 0.0, clips: int = 0) -> tuple[Data, Data]:
    """Split a data set into training and held-out parts.

    Args:
        dataset: the whole data set.
        share: approximate fraction of the files to hold out, in (0, 1). Each file is decided
            independently.
        clips: exact number of files to hold out instead: those that a growing share takes first.

    Returns:
        The training part and the held-out part.

    Raises:
        ConfigError: if nothing would be held out, or nothing would be left to train on.
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
            f"{'train on' if chosen else 'measure'}; choose another --heldout.share, or a number "
            "of files with --heldout.clips"
        )
    held = {item for name in chosen for item in items[name]}
    return dataset.part(set(range(len(dataset))) - held), dataset.part(held)


def _place(name: str) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on the name."""
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
