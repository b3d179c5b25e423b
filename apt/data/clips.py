"""Data sets of the user's own as training data: each clip is looked at before it is trained on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from apt.data.buckets import Bucket
from apt.data.captions import Refused
from apt.data.dataset import BucketOrder, Sample, Shuffled, VideoDataset
from apt.data.source import ClipRequest
from apt.errors import DataError

__all__ = ["MapStyle", "check_clips", "clip_size"]

_EXPECTED = "expected a pair of pixels (3, T, H, W), float32 in [-1, 1], and a caption"
# Room for the rounding of a codec or of a resize.
_LARGEST = 1.001
_HASHED = 4


@runtime_checkable
class MapStyle(Protocol):
    """What `torch.utils.data.Dataset` calls map-style: items by number, and how many there are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class _Ordered(Protocol):
    """A data set that gives its own batches, as `apt.data.dataset.VideoDataset` does."""

    @property
    def fingerprint(self) -> str: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]: ...


def check_clips(dataset: Any, request: ClipRequest) -> VideoDataset:
    """A data set of the user's own as training data; its first clip is looked at now.

    Args:
        dataset: map-style, where item i is a pair of pixels (3, T, H, W) float32 in [-1, 1] and a
            caption, or a `Sample`; pixels alone will do where captions are not read. Items must not
            change, or a resumed run does not continue where it stopped. One with `batches` and
            `fingerprint` (`apt.data.dataset.VideoDataset`) keeps its own order, and may have
            several sizes.
        request: the size of clips, and what becomes of captions.

    Raises:
        DataError: it is no such data set, it is empty, or its first clip cannot be used. Others
            raise it when they are read.
    """
    if isinstance(dataset, _Ordered):
        clips: VideoDataset = _CheckedOrder(dataset, request)
    elif isinstance(dataset, MapStyle):
        clips = _CheckedItems(dataset, request)
    else:
        raise DataError(
            f"{_name(dataset)} is no data set: expected __len__ and __getitem__, as a map-style "
            "torch.utils.data.Dataset has them"
        )
    clips[0]
    return clips


def clip_size(dataset: Any) -> Bucket | None:
    """The size that a map-style data set's first clip has; None if that does not tell.

    Raises DataError if the first clip cannot be used.
    """
    if isinstance(dataset, _Ordered) or not isinstance(dataset, MapStyle) or not len(dataset):
        return None
    pixels = _pixels_and_caption(dataset[0], f"{_name(dataset)}, item 0", captioned=False)[0]
    return Bucket(*pixels.shape[1:])


class _CheckedItems(Shuffled):
    """A map-style data set, shuffled in passes. Index `epoch * len + item` is an item in a pass."""

    def __init__(self, dataset: MapStyle, request: ClipRequest) -> None:
        self._dataset = dataset
        self._request = request
        self._length = len(dataset)
        if self._length < 1:
            raise DataError(f"{_name(dataset)} is empty: expected at least one clip")
        self._order = BucketOrder({request.size: list(range(self._length))}, self._length)

    def __len__(self) -> int:
        return self._length

    @property
    def fingerprint(self) -> str:
        """A hash of the length and of the first clips."""
        return _fingerprint(self, repr((_name(self._dataset), self._length)), self._length)

    def __getitem__(self, index: int) -> Sample:
        item = index % self._length
        where = self.file_name(index)
        sample = _checked(self._dataset[item], where, self._request)
        size = Bucket(*sample.pixels.shape[1:])
        if size != self._request.size:
            raise DataError(
                f"{where} is {size}, and the run asks for "
                f"{self._request.size} (--data.frames, --data.height, --data.width): clips of a "
                "data set without batches of its own have one size"
            )
        return sample

    def file_name(self, index: int) -> str:
        """The name of a sample, for messages."""
        return f"{_name(self._dataset)}, item {index % self._length}"


class _CheckedOrder:
    """A data set with an order of its own."""

    def __init__(self, dataset: _Ordered, request: ClipRequest) -> None:
        self._dataset = dataset
        self._request = request

    @property
    def fingerprint(self) -> str:
        return str(self._dataset.fingerprint)

    def __getitem__(self, index: int) -> Sample:
        return _checked(self._dataset[index], self.file_name(index), self._request)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """The data set's own."""
        return self._dataset.batches(batch_size, seed=seed, start=start)

    def file_name(self, index: int) -> str:
        """The name of a sample, for messages."""
        return f"{_name(self._dataset)}, sample {index}"


def _checked(item: Any, where: str, request: ClipRequest) -> Sample:
    """The sample that an item is, fit to train on. Raises DataError that says what is wrong."""
    pixels, caption = _pixels_and_caption(item, where, captioned=request.captioned)
    if not bool(pixels.isfinite().all()):
        raise DataError(f"{where} has values that are NaN or infinite; {_EXPECTED}")
    low, high = pixels.aminmax()
    if max(-float(low), float(high)) > _LARGEST:
        raise DataError(
            f"{where} has values from {float(low):.4g} to {float(high):.4g}; {_EXPECTED}"
        )
    if request.captions is not None:
        used = request.captions.apply([caption], [where])[0]
        if isinstance(used, Refused):
            raise DataError(
                f"{where}: {used.kind} ({used.reason}); leave it out of the data set, or cut such "
                "captions (--data.long-captions cut)"
            )
        caption = used
    given = item if isinstance(item, Sample) else Sample(pixels, caption)
    for name, value in given.extra.items():
        _check_extra(name, value, where)
    extra = {name: value.detach() for name, value in given.extra.items()}
    return dataclasses.replace(given, pixels=pixels.detach(), caption=caption, extra=extra)


def _check_extra(name: Any, value: Any, where: str) -> None:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise DataError(
            f"{where} has {name!r} of type {type(value).__name__} in Sample.extra; expected "
            "tensors by name"
        )
    if value.device.type != "cpu":
        raise DataError(f"{where} has {name!r} on {value.device}; give it on the CPU")
    if not bool(value.isfinite().all()):
        raise DataError(f"{where} has values in {name!r} that are NaN or infinite")


def _pixels_and_caption(item: Any, where: str, *, captioned: bool) -> tuple[Tensor, str]:
    if isinstance(item, Sample):
        item = (item.pixels, item.caption)
    if isinstance(item, Tensor):
        if captioned:
            raise DataError(f"{where} has no caption; {_EXPECTED}")
        item = (item, "")
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise DataError(f"{where} is a {type(item).__name__}{size}; {_EXPECTED}")
    pixels, caption = item
    if not isinstance(pixels, Tensor):
        raise DataError(f"{where} has pixels of type {type(pixels).__name__}; {_EXPECTED}")
    if pixels.dtype != torch.float32:
        hint = ": uint8 is pixels / 127.5 - 1" if pixels.dtype == torch.uint8 else ""
        raise DataError(f"{where} is {str(pixels.dtype).removeprefix('torch.')}; {_EXPECTED}{hint}")
    if pixels.device.type != "cpu":
        raise DataError(f"{where} is on {pixels.device}; {_EXPECTED}, on the CPU")
    if pixels.ndim != 4 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise DataError(f"{where} has the shape {tuple(pixels.shape)}; {_EXPECTED}")
    if not isinstance(caption, str):
        raise DataError(f"{where} has the caption {caption!r}; {_EXPECTED}")
    return pixels, caption


def _fingerprint(clips: VideoDataset, start: str, length: int) -> str:
    digest = hashlib.sha256(start.encode())
    for index in range(min(length, _HASHED)):
        sample = clips[index]
        digest.update(sample.caption.encode())
        digest.update(sample.pixels.numpy().tobytes())
        for name in sorted(sample.extra):
            value = sample.extra[name].detach()
            digest.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
            digest.update(value.double().numpy().tobytes())
    return digest.hexdigest()


def _name(dataset: Any) -> str:
    return type(dataset).__qualname__
