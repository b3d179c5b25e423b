"""The order of training: shuffled batches of one shape each, that continue at any point."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Collection, Hashable, Iterator, Mapping
from itertools import count
from typing import Generic, TypeVar

import torch

from apt.errors import ConfigError
from apt.rng import generator_for

_LOG = logging.getLogger(__name__)

Shape = TypeVar("Shape", bound=Hashable)


class BucketOrder(Generic[Shape]):
    """Endless passes over items that come in several shapes.

    Every pass shuffles each shape's items, and then the batches, by (seed, pass). A batch that a
    shape's pass leaves incomplete is filled from its next pass, so nothing is dropped.

    Args:
        members: the items, by number, of each shape. Their order counts, and `str` of a shape.
        num_items: of all shapes; index `pass * num_items + item` is an item in a pass.

    Attributes:
        members: as given.
    """

    def __init__(self, members: Mapping[Shape, list[int]], num_items: int) -> None:
        self.members = members
        self._num_items = num_items

    def part(self, items: Collection[int]) -> BucketOrder[Shape]:
        """The order of some of the items alone, whose indices stay as they are."""
        wanted = set(items)
        left = {s: [item for item in own if item in wanted] for s, own in self.members.items()}
        return BucketOrder({s: own for s, own in left.items() if own}, self._num_items)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Global batches of indices for ever, from batch number `start`, found without walking.

        Raises ConfigError for a batch size below 1, or a negative start.
        """
        if batch_size < 1 or start < 0:
            raise ConfigError(
                f"batch_size must be at least 1 and start at least 0, got {batch_size} and {start}"
            )
        sizes = {shape: len(items) for shape, items in self.members.items()}
        for shape, size in sizes.items():
            if size < batch_size:
                _LOG.warning(
                    "bucket %s has %d %s for batches of %d: a batch repeats what is there; use "
                    "fewer buckets, a smaller batch or more files",
                    shape, size, "item" if size == 1 else "items", batch_size,
                )  # fmt: skip

        def completed(epochs: int) -> int:
            return sum(epochs * size // batch_size for size in sizes.values())

        # The pass in which batch number `start` is completed.
        limit = 1
        while completed(limit) <= start:
            limit *= 2
        epoch = bisect.bisect_right(range(limit), start, key=completed) - 1
        skipped = start - completed(epoch)
        for current in count(epoch):
            yield from self._epoch_batches(batch_size, seed, current, skipped)
            skipped = 0

    def _epoch_batches(
        self, batch_size: int, seed: int, epoch: int, skipped: int
    ) -> Iterator[list[int]]:
        """The batches that are completed in pass `epoch`, in their order, without the first."""
        due = [
            (shape, number)
            for shape, items in self.members.items()
            for number in range(
                epoch * len(items) // batch_size, (epoch + 1) * len(items) // batch_size
            )
        ]
        order = torch.randperm(len(due), generator=generator_for("batch order", seed, epoch))
        shuffled: dict[tuple[Shape, int], list[int]] = {}
        for position in order.tolist()[skipped:]:
            shape, number = due[position]
            size = len(self.members[shape])
            batch = []
            for place in range(number * batch_size, (number + 1) * batch_size):
                key = (shape, place // size)
                if key not in shuffled:
                    shuffled[key] = self._shuffled(seed, *key)
                batch.append(shuffled[key][place % size])
            yield batch

    def _shuffled(self, seed: int, shape: Shape, epoch: int) -> list[int]:
        """Indices of a shape's items in pass `epoch`, in that pass's order."""
        items = self.members[shape]
        generator = generator_for("item order", seed, str(shape), epoch)
        order = torch.randperm(len(items), generator=generator).tolist()
        return [epoch * self._num_items + items[place] for place in order]
