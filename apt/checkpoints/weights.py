"""Modules filled from checkpoints: built without memory, every key accounted for, every value
finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from apt.checkpoints.foreign import Marks, Shapes, advice
from apt.checkpoints.info import ComponentInfo
from apt.checkpoints.layouts import Family, diffusion_model, family_marks, family_of, map_keys
from apt.checkpoints.reading import Piece, StoredTensor, read_stored
from apt.errors import CheckpointError, InputError, listed
from apt.files import write_safetensors
from apt.registry import Buildable, Registry, suggest

C = TypeVar("C", bound=Buildable)


@dataclass(frozen=True)
class Checkpoint:
    """Where a backbone's weights are, and what they are weights of.

    Attributes:
        weights: a safetensors file, or the index of shards.
        architecture: registered name; `config` may differ from what is registered.
        config: to build from.
    """

    weights: Path
    architecture: str
    config: Buildable

    def load(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Any:
        """Build and load, strictly; the backbone is in evaluation mode.

        Peak memory is that of the loaded model and one tensor: it is built without memory, and
        each tensor is cast on its way from the mapped file. On the meta device it has no weights
        yet, and an `origin` that they can be had from, which fits it.
        """
        module = empty_module(self.config, dtype)
        stored = read_stored(self.weights)
        marks: Marks = {}
        is_own = {key: tensor.shape for key, tensor in stored.items()} == _shapes(module)
        if is_own and not any(tensor.may_need_scale for tensor in stored.values()):
            pieces = {key: Piece(tensor) for key, tensor in stored.items()}
        else:
            pieces, marks = self._converted(stored, module), family_marks()
        source = str(self.weights)
        if torch.device(device).type == "meta":
            check_fit(module, pieces, source=source, marks=marks)
            begin_at(module, StoredPieces(pieces, source))
            return module.eval()
        fill(module, pieces, source=source, device=device, marks=marks)
        return module.to(device).eval()

    def _converted(self, stored: Mapping[str, StoredTensor], module: nn.Module) -> dict[str, Piece]:
        """Where each tensor of the module lies in a file that is not in our own layout."""
        model = diffusion_model(stored)
        family = family_of(self.config)
        if family is not None:
            check_kind(self.weights, family, model)
        rules = () if family is None else family.rules_for(self.config)
        return map_keys(model, module.state_dict().keys(), rules)


def check_kind(path: Path, family: Family, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError that says what a checkpoint of the family is, if it is none of those
    that our module takes."""
    relative = family.relative({key: tensor.shape for key, tensor in stored.items()})
    if relative is not None:
        raise CheckpointError(
            f"{str(path)!r} is {relative}; of the family {family.name!r} only the plain "
            f"{family.makes} models are here: use the checkpoint of one"
        )


def empty_module(config: Buildable, dtype: torch.dtype | None = None) -> Any:
    """The module of a config on the meta device, for `fill`.

    `dtype` casts it as `module.to` does, so layers that keep fp32 keep it.

    Raises InputError for a module with buffers that no checkpoint would hold.
    """
    with torch.device("meta"):
        module = config.build()
    lost = [name for name, _ in module.named_buffers() if name not in module.state_dict()]
    if lost:
        raise InputError(
            f"{type(module).__name__} has buffers that no checkpoint holds ({', '.join(lost)}); "
            "register them with persistent=True, or compute them where they are used"
        )
    return module if dtype is None else module.to(dtype)


def shapes_of(config: Buildable) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's state, without building it in memory."""
    return _shapes(empty_module(config))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def configured(registry: Registry[C], part: ComponentInfo, origin: Path) -> C:
    """The config of a part as a folder describes it; what it refuses is the folder's fault."""
    if part.architecture not in registry.names():
        raise CheckpointError(
            f"{str(origin)!r} describes the {registry.kind} {part.architecture!r}, which is not "
            "registered here: import the module that registers it (diffusion-apt --import MODULE), "
            "or use a newer version of this package, if it is one of that; otherwise "
            f"{suggest(part.architecture, registry.names())}"
        )
    try:
        return registry.configured(part.architecture, part.config)
    except InputError as error:
        raise unbuildable(origin, error) from error


def unbuildable(origin: Path, error: InputError) -> CheckpointError:
    """The error for a description that a part refuses."""
    return CheckpointError(
        f"{str(origin)!r} describes a model that cannot be built: {error}; it may come from a "
        "newer version of this package"
    )


@dataclass(frozen=True)
class StoredPieces:
    """Where the weights of a module are.

    Attributes:
        pieces: by name in the module as it was built.
        source: for messages.
    """

    pieces: Mapping[str, Piece]
    source: str

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredPieces:
        return self


def begin_at(module: Any, origin: StoredPieces) -> None:
    """Say where the weights of a module on the meta device are, which it has in full as yet."""
    module.origin = origin
    for layer in module.modules():
        # Rows that it was built without are not in the files either.
        if hasattr(layer, "stored_rows"):
            del layer.stored_rows


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
    check_fit(module, pieces, source=source, marks=marks)
    with torch.no_grad():
        for key, target in module.state_dict(keep_vars=True).items():
            if target.is_meta:
                owner, _, name = key.rpartition(".")
                target = put_empty(module.get_submodule(owner), name, device)
            copy_piece(pieces[key], target)


def check_fit(
    module: nn.Module, pieces: Mapping[str, Piece], *, source: str, marks: Marks | None = None
) -> None:
    """Raise CheckpointError unless `fill` could copy the pieces into the module."""
    targets = module.state_dict(keep_vars=True)
    _check_keys(
        source,
        {key: piece.shape for key, piece in pieces.items()},
        {key: tuple(target.shape) for key, target in targets.items()},
        marks or {},
    )
    for key, target in targets.items():
        stored = pieces[key].stored
        if target.is_floating_point() and not stored.is_floating_point:
            raise CheckpointError(
                f"{str(stored.file)!r}: {stored.key!r} is {stored.dtype} and no scale lies beside "
                "it: it is quantised in a way that is not known here; use the bf16 or fp16 file of "
                "the same model"
            )


def copy_piece(piece: Piece, target: Tensor, rows: slice | None = None) -> None:
    """Copy a stored tensor into one of a module, casting to its dtype.

    Args:
        target: on any device; of a sharded one, this rank's part.
        rows: which of the whole that part is; None if it is the whole.

    Raises CheckpointError for values that are not finite.
    """
    target, file, key = target.detach(), str(piece.stored.file), piece.stored.key
    with piece.stored.mapped() as whole:
        value = piece.take(whole)
        value = value if rows is None else value[rows]
        check_finite(file, key, value)
        target.copy_(value)
        if target.dtype == torch.float16 and value.dtype != torch.float16:
            # The only type here whose range is narrower than that of files.
            check_finite(file, key, target)


def put_empty(owner: nn.Module, name: str, device: torch.device | str) -> Tensor:
    """Put an empty tensor on `device` in the place of one of a module on the meta device."""
    old = getattr(owner, name)
    new = torch.empty_like(old, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(owner, name, new)
    return new


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a module's state as safetensors; `dtype` None keeps each tensor's own.

    Raises:
        CheckpointError: for values that are not finite, before or after casting, or a disk that
            refuses. A file that was there before is then untouched.
    """
    save_tensors(path, module.state_dict(), dtype)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    like: Mapping[str, Tensor] | None = None,
) -> None:
    """Write tensors as one safetensors file, one after the other; see `save_weights`.

    `like` has the names, shapes and types of `tensors`, on any device, if those are costly to make:
    each is then asked for once.
    """

    def ready(key: str) -> Tensor:
        tensor = cast_type(tensors[key].detach().cpu(), dtype)
        check_finite(str(path), key, tensor)
        return tensor

    kinds = {
        key: cast_type(torch.empty_like(value, device="meta"), dtype)
        for key, value in (tensors if like is None else like).items()
    }
    try:
        write_safetensors(path, kinds, value=ready)
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


def _check_keys(source: str, stored: Shapes, expected: Shapes, marks: Marks) -> None:
    """Raise CheckpointError unless `stored` has exactly the keys and shapes of `expected`.

    Args:
        source: where the tensors come from, for the message.
        stored, expected: shapes by key.
        marks: of the families that a foreign checkpoint may belong to.
    """
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    reshaped = [
        f"{key} is {_shape(stored[key])}, expected {_shape(expected[key])}"
        for key in sorted(expected.keys() & stored.keys())
        if stored[key] != expected[key]
    ]
    if not (missing or unexpected or reshaped):
        return
    problems = [
        f"{len(items)} {label}: {listed(items)}"
        for label, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrongly shaped", reshaped),
        )
        if items
    ]
    guess = advice(missing, unexpected, stored, expected, marks)
    raise CheckpointError(
        f"{source!r} does not fit the model that it is loaded into: {'; '.join(problems)}. {guess}"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
