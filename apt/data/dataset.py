"""What every data set hands out: samples, batches, and the protocol that trainers rely on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from apt.data.report import Problem
from apt.errors import DataError


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
