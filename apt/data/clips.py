"""Data sets of the user's own as training data. Each clip is checked before it is trained on."""

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
# Tolerates rounding by a codec or a resize.
_LARGEST = 1.001
_HASHED = 4


@runtime_checkable
class MapStyle(Protocol):
    """A map-style data set as in `torch.utils.data.Dataset`: items by index, and a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class _Ordered(Protocol):
    """A data set that makes its own batches, as `apt.data.dataset.VideoDataset` does."""

    @property
    def fingerprint(self) -> str: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]: ...


def check_clips(dataset: Any, request: ClipRequest) -> VideoDataset:
    """Wrap a data set of the user's own as training data, and check its first clip.

    Args:
        dataset: map-style; item i is a pair of pixels (3, T, H, W) float32 in [-1, 1] and a
            caption, or a `Sample`. Pixels alone are enough if captions are not read. Items must not
            change, or a resumed run would not continue where it stopped. A data set with `batches`
            and `fingerprint` (`apt.data.dataset.VideoDataset`) keeps its own order, and may have
            clips of several sizes.
        request: the size of the clips, and how to treat captions.

    Raises:
        DataError: if it is not such a data set, is empty, or its first clip cannot be used. Other
            clips are checked when they are read.
    """
    if isinstance(dataset, _Ordered):
        clips: VideoDataset = _CheckedOrder(dataset, request)
    elif isinstance(dataset, MapStyle):
        clips = _CheckedItems(dataset, request)
    else:
        raise DataError(
            f"{_name(dataset)} is not a data set: expected __len__ and __getitem__, as in a "
            "map-style torch.utils.data.Dataset"
        )
    clips[0]
    return clips


def clip_size(dataset: Any) -> Bucket | None:
    """Return the size of a map-style data set's first clip; None for other or empty data sets.

    Raises DataError if the first clip cannot be used.
    """
    if isinstance(dataset, _Ordered) or not isinstance(dataset, MapStyle) or not len(dataset):
        return None
    pixels = _pixels_and_caption(dataset[0], f"{_name(dataset)}, item 0", captioned=False)[0]
    return Bucket(*pixels.shape[1:])


class _CheckedItems(Shuffled):
    """A map-style data set, reshuffled in every pass. Index `epoch * len + item` is an item."""

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
        """A hash of the length and the first clips."""
        return _fingerprint(self, repr((_name(self._dataset), self._length)), self._length)

    def __getitem__(self, index: int) -> Sample:
        item = index % self._length
        where = self.file_name(index)
        sample = _checked(self._dataset[item], where, self._request)
        size = Bucket(*sample.pixels.shape[1:])
        if size != self._request.size:
            raise DataError(
                f"{where} is {size}, but the run asks for {self._request.size} (--data.frames, "
                "--data.height, --data.width); all clips of a data set without its own batches() "
                "must have this size"
            )
        return sample

    def file_name(self, index: int) -> str:
        """Return the name of a sample, for messages."""
        return f"{_name(self._dataset)}, item {index % self._length}"


class _CheckedOrder:
    """A data set with its own order."""

    def __init__(self, dataset: _Ordered, request: ClipRequest) -> None:
        self._dataset = dataset
        self._request = request

    @property
    def fingerprint(self) -> str:
        return str(self._dataset.fingerprint)

    def __getitem__(self, index: int) -> Sample:
        return _checked(self._dataset[index], self.file_name(index), self._request)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Return the data set's own batches."""
        return self._dataset.batches(batch_size, seed=seed, start=start)

    def file_name(self, index: int) -> str:
        """Return the name of a sample, for messages."""
        return f"{_name(self._dataset)}, sample {index}"


def _checked(item: Any, where: str, request: ClipRequest) -> Sample:
    """Return an item as a sample to train on. Raises DataError if something is wrong with it."""
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
                f"{where}: {used.kind} ({used.reason}); remove it from the data set, or cut such "
                "captions with --data.long-captions cut"
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
            f"{where} has {name!r} of type {type(value).__name__} in Sample.extra; expected a dict "
            "from names to tensors"
        )
    if value.device.type != "cpu":
        raise DataError(f"{where} has {name!r} on {value.device}; return it on the CPU")
    if not bool(value.isfinite().all()):
        raise DataError(
            f"{where} has values in {name!r} that are NaN or infinite; fix or remove it"
        )


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
        hint = "; convert uint8 with pixels / 127.5 - 1" if pixels.dtype == torch.uint8 else ""
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
