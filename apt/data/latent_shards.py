"""The files of a latent cache: safetensors files of many clips, or WebDataset shards."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from apt.data.buckets import Bucket
from apt.data.tar import Member, read_index, read_member, read_members, write_tar
from apt.errors import DataError
from apt.files import write_safetensors
from apt.untrusted import parse_json

__all__ = [
    "Clip", "Entry", "open_shard", "read_entries", "read_latents", "read_metadata", "write_clips",
    "write_shard",
]  # fmt: skip

T = TypeVar("T")

_TAR = ".tar"
_LATENTS = "latents"


class Clip(NamedTuple):
    """Latents (C, T', H', W') of a captioned clip, which had the bucket's size in pixels.

    `extra` are the clip's other conditions by name; `file` is its source.
    """

    latents: Tensor
    caption: str
    bucket: Bucket
    extra: Mapping[str, Tensor] = MappingProxyType({})
    file: str = ""


class Entry(NamedTuple):
    """A shard's description of a clip; `file` is empty in shards of earlier versions.

    `at` is the place of the clip's tensors in a tar file.
    """

    key: str
    caption: str
    bucket: Bucket
    file: str
    at: Member | None = None


def write_clips(path: Path, clips: Sequence[Clip]) -> None:
    """Write a shard of clips atomically, as a tar or safetensors file according to its suffix.

    Raises DataError for values that are not finite, or a failed write.
    """
    for clip in clips:
        for name, value in {_LATENTS: clip.latents, **clip.extra}.items():
            if not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"{name} of the clip {clip.caption!r} has values that are NaN or infinite in "
                    f"{value.dtype}; use a wider --dtype"
                )
    facts = [{"caption": c.caption, "bucket": list(c.bucket), "file": c.file} for c in clips]
    if path.suffix == _TAR:
        members: dict[str, bytes] = {}
        for number, (clip, fact) in enumerate(zip(clips, facts, strict=True)):
            tensors = {_LATENTS: clip.latents, **clip.extra}
            members[f"{number:06d}.safetensors"] = save(
                {name: value.contiguous() for name, value in tensors.items()}
            )
            members[f"{number:06d}.json"] = json.dumps(fact).encode()
        with _written(path):
            write_tar(path, members)
        return
    tensors = {}
    for number, clip in enumerate(clips):
        tensors[str(number)] = clip.latents
        tensors |= {f"{number}.{name}": value for name, value in clip.extra.items()}
    entries = {str(number): fact for number, fact in enumerate(facts)}
    write_shard(path, tensors, {"clips": json.dumps(entries)})


def read_entries(path: Path) -> list[Entry]:
    """Read the entries of a shard's clips. Raises DataError for a damaged file."""
    if path.suffix != _TAR:
        return read_metadata(
            path, "clips", lambda clips: [_entry(key, fact) for key, fact in clips.items()]
        )
    try:
        samples = read_index(path)
        facts = read_members(path, [parts["json"] for parts in samples.values()])
        return [
            _entry(key, parse_json(fact), parts["safetensors"])
            for (key, parts), fact in zip(samples.items(), facts, strict=True)
        ]
    except (OSError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def read_latents(path: Path, key: str, at: Member | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Read a clip's latents and its other conditions. Raises DataError for a damaged file."""
    if at is not None:
        try:
            extra = load(read_member(path, at))
            return extra.pop(_LATENTS), extra
        except (SafetensorError, KeyError, ValueError) as error:
            raise _damaged(path, error) from error
    with open_shard(path) as shard:
        beside = [name for name in shard.keys() if name.startswith(f"{key}.")]  # noqa: SIM118
        extra = {name.removeprefix(f"{key}."): shard.get_tensor(name) for name in beside}
        return shard.get_tensor(key), extra


def _entry(key: str, fact: Mapping[str, Any], at: Member | None = None) -> Entry:
    bucket = Bucket(*map(int, fact["bucket"]))
    return Entry(key, str(fact["caption"]), bucket, str(fact.get("file", "")), at)


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Raises DataError if it cannot be written."""
    with _written(path):
        write_safetensors(path, tensors, metadata)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; earlier shards are kept, so free "
            "some space and repeat the command to continue"
        ) from error


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading. Raises DataError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def read_metadata(path: Path, name: str, parse: Callable[[Any], T]) -> T:
    """Read an entry of a shard's metadata, converted by `parse`.

    Raises DataError if the file is damaged or has no such entry.
    """
    with open_shard(path) as shard:
        try:
            return parse(parse_json(shard.metadata()[name]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is not a file of a latent cache ({error}); delete it, and run the same "
                "`data encode` again"
            ) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is missing or damaged ({error}); delete it and run the same `data encode` "
        "again, which writes only that file"
    )
