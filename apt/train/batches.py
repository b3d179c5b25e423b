"""A rank's share of an update as micro-batches, of which one at a time is on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from apt.condition import EncodedText
from apt.data.dataset import Batch
from apt.methods.base import MicroBatch, Stage
from apt.models.codecs import LatentCodec

__all__ = ["MadeOneByOne", "MicroBatches", "encoded"]


class MadeOneByOne(Sequence[MicroBatch]):
    """So many micro-batches, each made when it is asked for."""

    def __init__(self, number: int) -> None:
        self._number = number

    @abstractmethod
    def make(self, number: int) -> MicroBatch:
        """The micro-batch of that number, from 0."""

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        numbers = range(self._number)[index]
        if isinstance(numbers, range):
            return [self.make(number) for number in numbers]
        return self.make(numbers)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (self.make(number) for number in range(self._number))


class MicroBatches(MadeOneByOne):
    """The micro-batches of one update, each read and encoded when it is first asked for.

    The parts of an update go over them one after the other. What a codec made of them waits in host
    memory for the next part, as do pixels, in the type in which they came.

    Args:
        stage: whose codec makes latents, if it has one, and whose device they go to.
        read: the next micro-batch of the loader.
        number: how many there are.
        watch: sees latents, and the pixels that they were made of if they were made here.
        between: called with the number of each before it is handed out.
    """

    def __init__(
        self,
        stage: Stage,
        read: Callable[[], Batch],
        number: int,
        *,
        watch: Callable[[Tensor | None, Tensor], None] | None = None,
        between: Callable[[int], None] = lambda number: None,
    ) -> None:
        super().__init__(number)
        self._stage = stage
        self._read = read
        self._watch = watch
        self._between = between
        self._kept: list[_Kept] = []

    def make(self, number: int) -> MicroBatch:
        self._between(number)
        while len(self._kept) <= number:
            self._kept.append(self._take(self._read()))
        return self._kept[number].on(self._stage.host.device)

    def skip(self) -> None:
        """Read what nothing has asked for, so that the loader is at the next update."""
        for _ in range(self._number - len(self._kept)):
            self._read()

    def _take(self, batch: Batch) -> _Kept:
        codec, device = self._stage.codec, self._stage.host.device
        x = batch.latents if batch.pixels is None else batch.pixels
        assert x is not None
        pixels = None
        if batch.pixels is not None and codec is not None:
            pixels = _values(batch.pixels, device)
            x = encoded(self._stage, codec, pixels)
        if self._watch is not None and codec is not None:
            self._watch(pixels, _values(x, device))
        # An only one stays where the next part wants it.
        kept = x if self._number == 1 else _to_host(x)
        return _Kept(kept, batch.captions, batch.extra, batch.offset)


def encoded(stage: Stage, codec: LatentCodec, pixels: Tensor) -> Tensor:
    """fp32 latents of pixels, in the codec's precision wherever they are asked for."""
    host = stage.host
    half = codec.encodes_in_autocast
    precision = host.autocast() if half else torch.autocast(host.device.type, enabled=False)
    with torch.no_grad(), precision:
        return codec.encode(pixels).float()


@dataclass(frozen=True)
class _Kept:
    """A micro-batch between two parts: pixels or latents, in as few bytes as they came in."""

    x: Tensor
    captions: list[str]
    extra: Mapping[str, Tensor]
    offset: int
    texts: dict[str, EncodedText] = field(default_factory=dict)

    def on(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            x=_values(self.x, device),
            captions=self.captions,
            extra={name: value.to(device, non_blocking=True) for name, value in self.extra.items()},
            offset=self.offset,
            texts=self.texts,
        )


def _to_host(x: Tensor) -> Tensor:
    """In page-locked memory if it comes from a GPU, which then fetches it back without waiting."""
    return x.cpu().pin_memory() if x.is_cuda else x


def _values(x: Tensor, device: torch.device) -> Tensor:
    """fp32 on the device; bytes are pixels, and become numbers only there."""
    there = x.to(device, non_blocking=True)
    return there.float() / 127.5 - 1 if x.dtype == torch.uint8 else there.float()
