"""What every data set hands out: samples, batches and their order, and the protocol that trainers
rely on."""

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
        problems: files that failed while this sample was made, and that it stands in for.
        extra: what it is conditioned on beside the caption, by name, such as a camera's path.
    """

    pixels: Tensor
    caption: str
    problems: tuple[Problem, ...] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedSample:
    """One captioned clip as latents (C, T', H', W'), in the type in which they were stored."""

    latents: Tensor
    caption: str
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Samples of a global batch that one rank gets at once: pixels, or latents.

    Attributes:
        pixels: (b, 3, T, H, W), float32 in [-1, 1], or uint8, which stands for x / 127.5 - 1.
        captions: b texts.
        offset: the index of the first sample within the global batch.
        batch_index: the number of the global batch since the start of the run.
        problems: files that failed while the samples were made.
        latents: (b, C, T', H', W') in place of pixels.
        extra: what the samples are conditioned on beside captions, by name, each (b, ...).
    """

    pixels: Tensor | None
    captions: list[str]
    offset: int
    batch_index: int
    problems: tuple[Problem, ...] = ()
    latents: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, which a GPU copies from without waiting."""
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

        Raises DataError for several shapes, or if they are not all conditioned on the same.
        """
        names = list(samples[0].extra)
        if any(sample.extra.keys() != set(names) for sample in samples):
            kinds = sorted({", ".join(sorted(s.extra)) or "captions alone" for s in samples})
            raise DataError(
                f"samples of one batch are conditioned on different things: {' and '.join(kinds)}; "
                "give all samples of a data set the same"
            )
        pixels = [sample.pixels for sample in samples if isinstance(sample, Sample)]
        latents = [sample.latents for sample in samples if isinstance(sample, EncodedSample)]
        shapes = sorted({tuple(tensor.shape) for tensor in [*pixels, *latents]})
        if len(shapes) > 1:
            raise DataError(
                f"batch {batch_index} has samples of the shapes {', '.join(map(str, shapes))}; all "
                "of a batch must have one: batches() of the data set brings them together"
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
    """A data set whose samples depend on their index alone, so that any reader order is exact.

    Indices are not bound by a length: an index also says which pass over the data it belongs to.
    """

    @property
    def fingerprint(self) -> str:
        """A hash that differs where samples would not continue as before after a resume."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """Sample `index`: the same one whenever, and in whichever process, it is asked for."""
        ...

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Global batches of indices for ever, from batch number `start`.

        All samples of a batch have one (T, H, W). `batches(n, seed=s, start=k)` continues exactly
        where the first k batches of `batches(n, seed=s)` ended.
        """
        ...


class VideoDataset(Indexed[Sample], Protocol):
    """A data set of clips as pixels."""


TrainingData = Indexed[Sample] | Indexed[EncodedSample]
"""What a run can be trained on."""


Shape = TypeVar("Shape", bound=Hashable)


class BucketOrder(Generic[Shape]):
    """The order of training: endless passes over items that come in several shapes.

    Its batches are of one shape each, and continue at any point.

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
                    "bucket %s has %d %s for batches of %d: a batch repeats what is there; add "
                    "files, take a smaller --batch-size, or have fewer buckets "
                    "(--data.no-native-ratio, --data.images none)",
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


class Shuffled:
    """A data set whose items are shuffled in passes, by an order that it sets as `_order`."""

    _order: BucketOrder[Bucket]

    @property
    def members(self) -> Mapping[Bucket, list[int]]:
        """The items of each bucket."""
        return self._order.members

    def part(self: Own, items: Collection[int]) -> Own:
        """The same data set with some of its items alone; an index is the same sample as before."""
        other = copy.copy(self)
        other._order = self._order.part(items)
        return other

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Global batches for ever, each of one bucket; see `BucketOrder`."""
        return self._order.batches(batch_size, seed=seed, start=start)
