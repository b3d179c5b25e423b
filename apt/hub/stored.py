"""Safetensors on disk: headers read and checked, tensors mapped one at a time.

A checkpoint is one file, or shards with an `.index.json` that says which key is where, as diffusers
and transformers write them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from apt.errors import CheckpointError

_MAX_HEADER = 100_000_000
"""What the safetensors library takes at most."""

INDEX_SUFFIX = ".index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet. `key` is its name there."""

    file: Path
    key: str
    shape: tuple[int, ...]

    @contextmanager
    def mapped(self) -> Iterator[Tensor]:
        """The tensor as a view of the mapped file, valid inside the block alone.

        The file is mapped anew each time: pages that were read would otherwise stay in the memory
        of this process until the last tensor is done, and loading would need twice the model.

        Raises CheckpointError if the file is damaged.
        """
        try:
            with safe_open(self.file, framework="pt") as stored:
                yield stored.get_tensor(self.key)
        except SafetensorError as error:
            raise CheckpointError(
                f"{str(self.file)!r} is damaged ({error}); copy or download it again"
            ) from error


def read_stored(path: str | Path) -> dict[str, StoredTensor]:
    """What a checkpoint holds, by key: `path` is a .safetensors file or an index of shards.

    Raises:
        CheckpointError: a file that is missing, truncated or not safetensors; an index that does
            not agree with its shards.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    return read_header(path)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises CheckpointError unless it is safetensors, and as long as its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            header = stream.read(length) if length < min(size, _MAX_HEADER) else b""
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(path)!r} is missing, though its model names it; copy the folder again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if start == b"version ":
        raise CheckpointError(f"{str(path)!r} is a Git LFS pointer; run `git lfs pull` to fetch it")
    pickled = f"{str(path)!r} is a pickle; only safetensors is read, as pickles can run code"
    if start[:4] == b"PK\x03\x04":
        raise CheckpointError(pickled)
    if size < 8 or (0 < length < _MAX_HEADER and len(header) < length):
        raise CheckpointError(
            f"{str(path)!r} is truncated: {size} bytes are not even its header; copy or download "
            "it again"
        )
    try:
        entries = {key: e for key, e in json.loads(header).items() if key != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        stored = {key: StoredTensor(path, key, tuple(e["shape"])) for key, e in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        # Only now: 0x80 is also a possible first byte of a good file, whose header length it is.
        if start[:1] == b"\x80":
            raise CheckpointError(pickled) from error
        raise CheckpointError(
            f"{str(path)!r} is not a safetensors file, or its header is damaged"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise CheckpointError(
            f"{str(path)!r} is {what}: it has {size} bytes, its header promises {expected}; copy "
            "or download it again"
        )
    return stored


def find_weights(folder: Path, stem: str) -> Path:
    """The file or index of shards in a component's folder: that of `stem`, or else the only one.

    Raises CheckpointError for none, several to choose from, or pickles alone.
    """
    for name in (f"{stem}.safetensors{INDEX_SUFFIX}", f"{stem}.safetensors"):
        if (folder / name).is_file():
            return folder / name
    indices = sorted(folder.glob(f"*.safetensors{INDEX_SUFFIX}"))
    found = indices or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{str(folder)!r} holds several checkpoints ({names}); name one")
    if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise CheckpointError(
            f"{str(folder)!r} holds pickles and no .safetensors file; pickles can run code and are "
            "never loaded: convert them with save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(f"{str(folder)!r} holds no .safetensors file; copy or download it again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a file that is missing, unreadable or none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path)!r} is missing; copy or download the folder") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r} is not valid JSON ({error}); the file is damaged, copy it again"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{str(path)!r} must hold a JSON object, got {document!r:.80}")
    return document


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise CheckpointError(f"{str(index)!r} has no weight_map of keys to files beside it")
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = read_header(index.parent / name)
        listed = {key for key, file in weight_map.items() if file == name}
        if listed != shard.keys():
            odd = sorted(listed ^ shard.keys())
            raise CheckpointError(
                f"{str(index)!r} does not agree with its shard {name!r} on {len(odd)} keys, such "
                f"as {odd[0]!r}; the files are of different checkpoints, download them again"
            )
        stored.update(shard)
    return stored
