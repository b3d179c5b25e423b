"""Samples, batches and their order, and the protocol of data sets that trainers rely on."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import logging
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from apt.data.buckets import Bucket
from apt.data.report import Problem
from apt.errors import ConfigError, DataError
from apt.rng import generator_for

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One captioned clip; an image is a clip of one frame.

    Attributes:
        pixels: (3, T, H, W) float32 in [-1, 1].
        caption: the text that describes it.
        problems: files that failed to decode and that this sample replaces.
        extra: other conditions by name, such as a camera path.
    """

    pixels: Tensor
    caption: str
    problems: tuple[Problem, ...] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedSample:
    """One captioned clip as latents (C, T', H', W'), in the dtype in which they were stored."""

    latents: Tensor
    caption: str
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: the samples of a global batch that one rank processes at once.

    Attributes:
        pixels: (b, 3, T, H, W), float32 in [-1, 1], or uint8 x that means x / 127.5 - 1.
        captions: b texts.
        offset: index of the first sample within the global batch.
        batch_index: number of the global batch since the start of the run.
        problems: files that failed to decode.
        latents: (b, C, T', H', W') instead of pixels.
        extra: other conditions by name, each (b, ...).
    """

    pixels: Tensor | None
    captions: list[str]
    offset: int
    batch_index: int
    problems: tuple[Problem, ...] = ()
    latents: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory, for asynchronous transfers to a GPU."""
        return dataclasses.replace(
            self,
            pixels=None if self.pixels is None else self.pixels.pin_memory(),
            latents=None if self.latents is None else self.latents.pin_memory(),
            extra={name: value.pin_memory() for name, value in self.extra.items()},
        )

    @classmethod
    def collate(
        cls, samples: Sequence[Sample | EncodedSample], *, offset: int, batch_index: int
    ) -> Batch:
        """Stack samples of one kind and one shape.

        Raises DataError if the shapes or the extra conditions differ.
        """
        names = list(samples[0].extra)
        if any(sample.extra.keys() != set(names) for sample in samples):
            kinds = sorted({", ".join(sorted(s.extra)) or "only captions" for s in samples})
            raise DataError(
                f"samples of one batch have different conditions: {' and '.join(kinds)}; give all "
                "samples of a data set the same ones"
            )
        pixels = [sample.pixels for sample in samples if isinstance(sample, Sample)]
        latents = [sample.latents for sample in samples if isinstance(sample, EncodedSample)]
        shapes = sorted({tuple(tensor.shape) for tensor in [*pixels, *latents]})
        if len(shapes) > 1:
            raise DataError(
                f"batch {batch_index} has samples of the shapes {', '.join(map(str, shapes))}; all "
                "samples of a batch must have the same shape, so batches() of the data set must "
                "group them by shape"
            )
        problems = (s.problems for s in samples if isinstance(s, Sample))
        return cls(
            pixels=torch.stack(pixels) if pixels else None,
            captions=[sample.caption for sample in samples],
            offset=offset,
            batch_index=batch_index,
            problems=tuple(problem for some in problems for problem in some),
            latents=torch.stack(latents) if latents else None,
            extra={name: torch.stack([sample.extra[name] for sample in samples]) for name in names},
        )


Item = TypeVar("Item", covariant=True)
Own = TypeVar("Own", bound="Shuffled")


class Indexed(Protocol[Item]):
    """A data set whose samples depend only on their index, so they can be read in any order.

    Indices may exceed the length: an index also determines the pass over the data.
    """

    @property
    def fingerprint(self) -> str:
        """A hash that changes if a resumed run would not get the same samples."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """Return sample `index`, which is the same at any time and in any process."""
        ...

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Yield global batches of indices without end, from batch number `start`.

        All samples of a batch have the same (T, H, W). `batches(n, seed=s, start=k)` continues
        exactly where the first k batches of `batches(n, seed=s)` ended.
        """
        ...


class VideoDataset(Indexed[Sample], Protocol):
    """A data set of clips as pixels."""


TrainingData = Indexed[Sample] | Indexed[EncodedSample]
"""The data sets that a run can be trained on."""


Shape = TypeVar("Shape", bound=Hashable)


class BucketOrder(Generic[Shape]):
    """The order of training: endless passes over items of several shapes.

    Each batch has one shape, and the order can be continued at any batch.

    Every pass shuffles the items of each shape, and then the batches, by (seed, pass). A batch
    that is incomplete at the end of a shape's pass is filled from the next pass, so no item is
    dropped.

    Args:
        members: the item numbers of each shape. The result depends on their order and on `str` of
            the shape.
        num_items: of all shapes; index `pass * num_items + item` is an item in a pass.

    Attributes:
        members: as passed.
    """

    def __init__(self, members: Mapping[Shape, list[int]], num_items: int) -> None:
        self.members = members
        self._num_items = num_items

    def part(self, items: Collection[int]) -> BucketOrder[Shape]:
        """Return the order of only these items, whose indices do not change."""
        wanted = set(items)
        left = {s: [item for item in own if item in wanted] for s, own in self.members.items()}
        return BucketOrder({s: own for s, own in left.items() if own}, self._num_items)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Yield global batches of indices without end, jumping directly to batch number `start`.

        Raises ConfigError for a batch size below 1 or a negative start.
        """
        if batch_size < 1 or start < 0:
            raise ConfigError(
                f"batch_size must be at least 1 and start at least 0, got {batch_size} and {start}"
            )
        sizes = {shape: len(items) for shape, items in self.members.items()}
        for shape, size in sizes.items():
            if size < batch_size:
                _LOG.warning(
                    "bucket %s has %d %s for batches of %d, so batches repeat items; add files, "
                    "use a smaller --batch-size, or use fewer buckets (--data.no-native-ratio, "
                    "--data.images none)",
                    shape, size, "item" if size == 1 else "items", batch_size,
                )  # fmt: skip

        def completed(epochs: int) -> int:
            return sum(epochs * size // batch_size for size in sizes.values())

        # Find the pass that completes batch number `start`.
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
        """Yield the batches that pass `epoch` completes, in order, without the `skipped` first."""
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
        """Return the indices of a shape's items in pass `epoch`, in the order of that pass."""
        items = self.members[shape]
        generator = generator_for("item order", seed, str(shape), epoch)
        order = torch.randperm(len(items), generator=generator).tolist()
        return [epoch * self._num_items + items[place] for place in order]


class Shuffled:
    """A data set whose items are reshuffled in every pass, by the order in its `_order`."""

    _order: BucketOrder[Bucket]

    @property
    def members(self) -> Mapping[Bucket, list[int]]:
        """The items of each bucket."""
        return self._order.members

    def part(self: Own, items: Collection[int]) -> Own:
        """Return the data set with only these items; an index is the same sample as before."""
        other = copy.copy(self)
        other._order = self._order.part(items)
        return other

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Yield global batches without end, each of one bucket; see `BucketOrder`."""
        return self._order.batches(batch_size, seed=seed, start=start)
