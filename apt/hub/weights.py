"""Tensors between files and modules: every key accounted for, every value finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apt.errors import CheckpointError
from apt.files import write_safetensors
from apt.hub.mismatch import Marks, check_keys
from apt.hub.stored import StoredTensor, read_header, read_stored


@dataclass(frozen=True)
class Piece:
    """A tensor of a module, as a part of a stored one.

    Attributes:
        stored: where it lies.
        part, parts: it is part number `part`, from 0, of `parts` equal ones along dimension 0.
        swap_halves: the two halves along dimension 0 trade places.
    """

    stored: StoredTensor
    part: int = 0
    parts: int = 1
    swap_halves: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part. A tensor that cannot be cut keeps its own, which then fits nothing."""
        shape = self.stored.shape
        if self.parts == 1 or not shape or shape[0] % self.parts:
            return shape
        return (shape[0] // self.parts, *shape[1:])

    def take(self, whole: Tensor) -> Tensor:
        """The part of the stored tensor."""
        part = whole if self.parts == 1 else whole.chunk(self.parts)[self.part]
        return torch.cat(part.chunk(2)[::-1]) if self.swap_halves else part


def load_weights(
    path: str | Path, module: nn.Module, *, device: torch.device | str = "cpu"
) -> None:
    """Copy a safetensors file, or the shards of an index, into a module; see `fill`.

    Args:
        path: of the file or the index.
        module: whose state is named as in the file.
        device: for what is on the meta device.

    Raises:
        CheckpointError: if a file is missing, truncated or not safetensors, its keys and shapes
            are not exactly the module's (it is then untouched), or a value is not finite.
    """
    pieces = {key: Piece(stored) for key, stored in read_stored(path).items()}
    fill(module, pieces, source=str(path), device=device)


def fill(
    module: nn.Module,
    pieces: Mapping[str, Piece],
    *,
    source: str,
    device: torch.device | str = "cpu",
    marks: Marks | None = None,
) -> None:
    """Copy stored tensors into a module, one at a time, casting to its dtypes.

    Parameters and buffers on the meta device are made on `device`; others stay where they are. At
    no time is there more in memory than the module and one tensor.

    Raises:
        CheckpointError: if the keys and shapes are not exactly the module's (it is then
            untouched), or a value is not finite.
    """
    targets = module.state_dict(keep_vars=True)
    check_keys(
        source,
        {key: piece.shape for key, piece in pieces.items()},
        {key: tuple(target.shape) for key, target in targets.items()},
        marks or {},
    )
    with torch.no_grad():
        for key, target in targets.items():
            piece = pieces[key]
            if target.is_floating_point() and not piece.stored.is_floating_point:
                raise CheckpointError(
                    f"{str(piece.stored.file)!r}: {piece.stored.key!r} is {piece.stored.dtype} "
                    "and no scale lies beside it: it is quantised in a way that is not known here; "
                    "use the bf16 or fp16 file of the same model"
                )
            with piece.stored.mapped() as whole:
                value = piece.take(whole)
                check_finite(str(piece.stored.file), piece.stored.key, value)
                if target.is_meta:
                    target = _materialise(module, key, device)
                target.copy_(value)
                if target.dtype == torch.float16 and value.dtype != torch.float16:
                    # The only type here whose range is narrower than that of files.
                    check_finite(str(piece.stored.file), piece.stored.key, target)


def _materialise(module: nn.Module, key: str, device: torch.device | str) -> Tensor:
    """Put an empty tensor on `device` in the place of one on the meta device."""
    owner_name, _, name = key.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = getattr(owner, name)
    new = torch.empty_like(old, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(owner, name, new)
    return new


def check_safetensors(path: Path) -> None:
    """Raise CheckpointError unless the file is safetensors and as long as its header says."""
    read_header(path)


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a module's state as safetensors; `dtype` None keeps each tensor's own.

    Raises:
        CheckpointError: for values that are not finite, before or after casting, or a disk that
            refuses. A file that was there before is then untouched.
    """
    save_tensors(path, module.state_dict(), dtype)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write tensors as one safetensors file; see `save_weights`."""
    ready: dict[str, Tensor] = {}
    for key, value in tensors.items():
        tensor = cast_type(value.detach().cpu(), dtype)
        check_finite(str(path), key, tensor)
        ready[key] = tensor
    try:
        write_safetensors(path, ready)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(path)!r}: {error.strerror or error}; free some space or choose "
            "another folder"
        ) from error


def cast_type(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it goes into a file: floating-point numbers in `dtype`, unless that is None."""
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def check_finite(path: str, key: str, value: Tensor) -> None:
    """Raise CheckpointError that names the tensor if a value is NaN or infinite."""
    if not value.is_floating_point() or not value.numel():
        return
    if value.element_size() == 1:
        # Types of 8 bits have hardly any operations.
        value = value.float()
    # NaN passes through both, and neither needs memory: temporary copies leave holes in the heap
    # that the small tensors after them keep open.
    low, high = torch.aminmax(value)
    if not math.isfinite(low) or not math.isfinite(high):
        bad = int((~torch.isfinite(value)).sum())
        raise CheckpointError(
            f"{path!r}: {bad} of {value.numel()} values of {key!r} are NaN or infinite in "
            f"{str(value.dtype).removeprefix('torch.')}; the training run diverged or the type is "
            "too narrow: use an earlier checkpoint or a wider type"
        )
