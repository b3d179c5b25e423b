"""Reading of model files: JSON made inert, and safetensors mapped one tensor at a time.

Configurations of transformers and diffusers can name Python modules, repositories of code, and
implementations to download from one: CVE-2026-4372, CVE-2026-5241 and CVE-2026-44513 are three
cases in which such code ran without permission. Our models need none of this: keys that name code
are rejected, and keys that choose an implementation are dropped.

A checkpoint is one safetensors file, or shards with an `.index.json` that maps keys to files, as
diffusers and transformers write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.errors import CheckpointError
from apt.untrusted import check_name, read_entries, read_json_file

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".index.json"
"""Suffix of an index of shards, after the name that a single file would have."""

_CODE = re.compile(r"_*(auto_map|trust_remote_code|custom_(pipeline|generate|code|module|class)s?)")
"""Keys that name code, or allow it."""

_IMPLEMENTATION = re.compile(r"implementation|kernel|att(entio)?n_backend")
"""Keys that choose an implementation, which this package does itself."""

_LIBRARIES = ("diffusers", "transformers")
"""Libraries that the classes of a pipeline's parts may come from."""

_BEGINNINGS: dict[bytes, str] = {
    b"GGUF": "is a GGUF file, whose quantisation is not supported; use the safetensors file of the "
    "same model (bf16, fp16 or fp8)",
    b"<!doctype": "is a web page, not a model: the server sent a login or error page; download the "
    "model again",
    b"<html": "is a web page, not a model: the server sent a login or error page; download the "
    "model again",
}


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object, unchanged.

    Raises CheckpointError for a file that is missing, unreadable, damaged, too large, too deeply
    nested, or not an object.
    """
    try:
        document = read_json_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path)!r} is missing; copy or download the folder") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r} is not valid JSON ({error}); the file is damaged, copy it again"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{str(path)!r} must contain a JSON object, got {document!r:.80}")
    return document


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration, without keys that choose an implementation.

    Raises CheckpointError as `read_document` does, and for a configuration that names code or a
    repository of code.
    """
    return inert(read_document(path), str(path))


def inert(document: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return a configuration without keys that choose an implementation.

    Raises CheckpointError, which names file and key, for a configuration that names code.
    """
    return _inert(document, file, "")


def read_pipeline(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a `model_index.json`; return it and the names of its parts, which are folders beside it.

    Raises CheckpointError as `read_json` does, and for a part whose name cannot be that of a folder
    beside it, or whose class is not from diffusers or transformers.
    """
    index = read_json(path)
    parts = []
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
            continue
        if value[0] not in _LIBRARIES:
            raise refusal(str(path), name, value)
        if not name.isidentifier():
            raise CheckpointError(
                f"{str(path)!r} has a part {name!r}, which is not the name of a folder beside it; "
                "use a pipeline from its original source"
            )
        parts.append(name)
    return index, parts


def refusal(file: str, key: str, value: Any) -> CheckpointError:
    """Return the error for a file that names code."""
    return CheckpointError(
        f"{file!r} names code, or a repository of code, under {key!r} ({json.dumps(value)[:80]}); "
        "code of models is never run: use a model without it, or delete that key once you have "
        "read the code"
    )


def _inert(value: Any, file: str, place: str) -> Any:
    if isinstance(value, list):
        return [_inert(entry, file, place) for entry in value]
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, entry in value.items():
        where, name = f"{place}.{key}" if place else key, key.lower()
        chooses = _IMPLEMENTATION.search(name) is not None and not _is_size(entry)
        if _names_code(name, entry) or (chooses and "/" in json.dumps(entry)):
            raise refusal(file, where, entry)
        if not chooses and not _CODE.fullmatch(name):
            kept[key] = _inert(entry, file, where)
    return kept


def _names_code(name: str, entry: Any) -> bool:
    if name == "_class_name":
        # A list of two names a module beside the file and a class in it.
        return entry is not None and not (isinstance(entry, str) and entry.isidentifier())
    return _CODE.fullmatch(name) is not None and bool(entry)


def _is_size(entry: Any) -> bool:
    """Whether a value is a size, such as that of a convolution's kernel."""
    return re.fullmatch(r"[\d\s.,\[\]-]+", json.dumps(entry)) is not None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which has not been read yet.

    Attributes:
        file, key: its file, and its name there.
        shape: its shape.
        dtype: its dtype as spelt by safetensors: F32, BF16, F8_E4M3, I8, ...
        scale: factor of the stored numbers; None if they are the values.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    scale: StoredTensor | None = None

    @property
    def may_need_scale(self) -> bool:
        """Whether its numbers have at most 8 bits; see `apt.checkpoints.scales`."""
        return self.dtype.startswith(("F8", "F4", "I8", "U8"))

    @property
    def is_floating_point(self) -> bool:
        """Whether its values are real numbers: it is stored in floating point or has a scale."""
        return self.scale is not None or self.dtype.startswith(("F", "BF"))

    @contextmanager
    def mapped(self) -> Iterator[Tensor]:
        """Provide the tensor as a view of the mapped file, valid only inside the block.

        A tensor with a scale is a copy in fp32 instead.

        The file is mapped for each tensor: otherwise pages that were read would stay in this
        process's memory until the last tensor is done, and loading would need twice the model's
        size.

        Raises CheckpointError if the file is damaged, or the scale does not fit.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as stored:
                value = stored.get_tensor(self.key)
                if self.scale is None:
                    yield value
                    return
                with self.scale.mapped() as scale:
                    yield self._scaled(value, scale)
        except SafetensorError as error:
            raise CheckpointError(
                f"{str(self.file)!r} is damaged ({error}); copy or download it again"
            ) from error

    def _scaled(self, value: Tensor, scale: Tensor) -> Tensor:
        """Apply a scale of the whole tensor, of each row, or of equal parts of rows."""
        value, scale = value.float(), scale.float()
        if scale.numel() == 1:
            return value * scale.reshape(())
        rows, parts = scale.shape[0], scale[0].numel()
        if value.ndim < 2 or rows != value.shape[0] or value[0].numel() % parts:
            raise CheckpointError(
                f"{str(self.file)!r}: {self.key!r} is {tuple(value.shape)} and its scale "
                f"{tuple(scale.shape)}; expected one number, one per row, or one for each of some "
                "equal parts of a row; use the bf16 or fp16 file of the same model"
            )
        return (value.reshape(rows, parts, -1) * scale.reshape(rows, parts, 1)).reshape(value.shape)


@dataclass(frozen=True)
class Piece:
    """A tensor of a module, as a part of a stored one.

    Attributes:
        stored: the stored tensor.
        part, parts: it is part number `part`, from 0, of `parts` equal ones along dimension 0.
        swap_halves: swap the two halves along dimension 0.
        rows: slices of the result, to be concatenated; empty for all of it.
    """

    stored: StoredTensor
    part: int = 0
    parts: int = 1
    swap_halves: bool = False
    rows: tuple[slice, ...] = ()

    def __hash__(self) -> int:
        return hash((self.stored.file, self.stored.key, self.part, self.parts))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part; that of the whole, which then fits nothing, if it cannot split."""
        shape = self.stored.shape
        if self.parts == 1 or not shape or shape[0] % self.parts:
            return shape
        return (shape[0] // self.parts, *shape[1:])

    def take(self, whole: Tensor) -> Tensor:
        """Return the part of the stored tensor."""
        import torch  # slow, and not needed to read descriptions

        part = whole if self.parts == 1 else whole.chunk(self.parts)[self.part]
        if self.swap_halves:
            part = torch.cat(part.chunk(2)[::-1])
        return torch.cat([part[rows] for rows in self.rows]) if self.rows else part


def read_stored(path: str | Path) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by key; `path` is a .safetensors file or an index of shards.

    Raises:
        CheckpointError: for a file that is missing, truncated or not safetensors, or an index that
            does not match its shards.
    """
    path = Path(path)
    _check_file_kind(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    return read_header(path)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file. Raises CheckpointError; see `read_entries`."""
    entries = read_entries(path)
    return {
        key: StoredTensor(path, key, tuple(e["shape"]), e["dtype"]) for key, e in entries.items()
    }


def _check_file_kind(path: Path) -> None:
    """Raise CheckpointError for a file of a known other kind.

    A file that cannot be read passes: reading it later says why.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(16).lstrip()
    except OSError:
        return
    for beginning, kind in _BEGINNINGS.items():
        if start[: len(beginning)].lower() == beginning.lower():
            raise CheckpointError(f"{str(path)!r} {kind}")


def shard_names(index: Path) -> dict[str, str]:
    """Return the `weight_map` of an index, from keys to names of files beside it.

    Raises CheckpointError if there is none, or it names files elsewhere.
    """
    weight_map = read_document(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(
            f"{str(index)!r} has no weight_map from keys to files; download it again"
        )
    for name in weight_map.values():
        try:
            if "/" in check_name(name):
                raise ValueError(f"{name!r} is in another folder")
        except ValueError as error:
            raise CheckpointError(
                f"the weight_map of {str(index)!r} names a file that is not beside it: {error}; "
                "download the checkpoint from its author again"
            ) from error
    return dict(weight_map)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = shard_names(index)
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = read_header(index.parent / name)
        listed = {key for key, file in weight_map.items() if file == name}
        if listed != shard.keys():
            odd = sorted(listed ^ shard.keys())
            raise CheckpointError(
                f"{str(index)!r} and its shard {name!r} differ in {len(odd)} keys, such as "
                f"{odd[0]!r}; the files are from different checkpoints, download them again"
            )
        stored.update(shard)
    return stored
