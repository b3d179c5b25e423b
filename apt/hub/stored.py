"""Safetensors on disk: headers read and checked, tensors mapped one at a time.

A checkpoint is one file, or shards with an `.index.json` that says which key is where, as diffusers
and transformers write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from apt.errors import CheckpointError
from apt.hub.foreign import check_file_kind
from apt.hub.header import read_entries
from apt.hub.inert import read_document
from apt.untrusted import check_name

INDEX_SUFFIX = ".index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        file, key: where it lies, and its name there.
        shape: of the tensor.
        dtype: as safetensors spells it: F32, BF16, F8_E4M3, I8, ...
        scale: what the stored numbers are to be multiplied with; None if they are the values.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    scale: StoredTensor | None = None

    @property
    def is_floating_point(self) -> bool:
        """Whether its values are real numbers: stored so, or with a scale beside them."""
        return self.scale is not None or self.dtype.startswith(("F", "BF"))

    @contextmanager
    def mapped(self) -> Iterator[Tensor]:
        """The tensor as a view of the mapped file, valid inside the block alone; in fp32, and not a
        view, if it has a scale.

        The file is mapped anew each time: pages that were read would otherwise stay in the memory
        of this process until the last tensor is done, and loading would need twice the model.

        Raises CheckpointError if the file is damaged, or the scale does not fit.
        """
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
        """The values: a scale is for the whole tensor, for each row, or for equal parts of rows."""
        value, scale = value.float(), scale.float()
        if scale.numel() == 1:
            return value * scale.reshape(())
        rows, parts = scale.shape[0], scale[0].numel()
        if value.ndim < 2 or rows != value.shape[0] or value[0].numel() % parts:
            raise CheckpointError(
                f"{str(self.file)!r}: {self.key!r} is {tuple(value.shape)} and its scale "
                f"{tuple(scale.shape)}, expected one number, one for each row, or one for each of "
                "some equal parts of a row; use the bf16 or fp16 file of the same model"
            )
        return (value.reshape(rows, parts, -1) * scale.reshape(rows, parts, 1)).reshape(value.shape)


def read_stored(path: str | Path) -> dict[str, StoredTensor]:
    """What a checkpoint holds, by key: `path` is a .safetensors file or an index of shards.

    Raises:
        CheckpointError: a file that is missing, truncated or not safetensors; an index that does
            not agree with its shards.
    """
    path = Path(path)
    check_file_kind(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    return read_header(path)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises CheckpointError; see `read_entries`."""
    entries = read_entries(path)
    return {
        key: StoredTensor(path, key, tuple(e["shape"]), e["dtype"]) for key, e in entries.items()
    }


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


def shard_names(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: the file beside it that each key is in.

    Raises CheckpointError if there is none, or it names another place.
    """
    weight_map = read_document(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{str(index)!r} has no weight_map of keys to files beside it")
    for name in weight_map.values():
        try:
            if "/" in check_name(name):
                raise ValueError(f"{name!r} is in another folder")
        except ValueError as error:
            raise CheckpointError(
                f"the weight_map of {str(index)!r} names a file that is not beside it: {error}; "
                "take the checkpoint from its author again"
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
                f"{str(index)!r} does not agree with its shard {name!r} on {len(odd)} keys, such "
                f"as {odd[0]!r}; the files are of different checkpoints, download them again"
            )
        stored.update(shard)
    return stored
