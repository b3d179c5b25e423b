"""The files of a latent cache: safetensors of many clips, or WebDataset shards of them."""

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
    """Latents (C, T', H', W') of a caption's clip, which had the bucket's size in pixels.

    `extra` is what else the clip is conditioned on, by name; `file` is what it was made of.
    """

    latents: Tensor
    caption: str
    bucket: Bucket
    extra: Mapping[str, Tensor] = MappingProxyType({})
    file: str = ""


class Entry(NamedTuple):
    """What a shard says of a clip; `file` is empty in those of earlier versions.

    `at` is where its tensors are in a tar file.
    """

    key: str
    caption: str
    bucket: Bucket
    file: str
    at: Member | None = None


def write_clips(path: Path, clips: Sequence[Clip]) -> None:
    """Write a shard of clips, whole or not at all; by its suffix a tar file or a safetensors one.

    Raises DataError for values that are not finite, or a disk that refuses.
    """
    for clip in clips:
        for name, value in {_LATENTS: clip.latents, **clip.extra}.items():
            if not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"{name} of the clip {clip.caption!r} are NaN or infinite in {value.dtype}; "
                    "encode in a wider type"
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
    """Of each clip in a shard. Raises DataError for a damaged file."""
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
    """A clip's latents, and what else it is conditioned on. Raises DataError for a damaged file."""
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
    """A safetensors file, whole or not at all. Raises DataError if the disk refuses."""
    with _written(path):
        write_safetensors(path, tensors, metadata)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; shards that were written before "
            "stay, and the same command goes on from them"
        ) from error


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A safetensors file to read from. Raises DataError if it is gone or damaged, also inside."""
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def read_metadata(path: Path, name: str, parse: Callable[[Any], T]) -> T:
    """What a shard's metadata says under a name, in the form that `parse` gives it."""
    with open_shard(path) as shard:
        try:
            return parse(parse_json(shard.metadata()[name]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is not a file of a latent cache ({error}); delete it"
            ) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is missing or damaged ({error}); delete it and run the same `data encode` "
        "again, which makes only that file"
    )
