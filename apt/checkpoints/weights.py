"""Strict loading of weights into modules, which are built without memory, and saving of weights.

Every key must match, and every value must be finite.
"""

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
    """The place of a backbone's weights, and the model that they belong to.

    Attributes:
        weights: a safetensors file, or an index of shards.
        architecture: registered name; `config` may differ from the registered config.
        config: the config to build the model from.
    """

    weights: Path
    architecture: str
    config: Buildable

    def load(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Any:
        """Build the backbone and load its weights strictly; it is in evaluation mode.

        Peak memory is that of the loaded model and one tensor: the model is built without memory,
        and each tensor is cast as it is copied from the mapped file. On the meta device the model
        has no weights yet, but an `origin` to load them from, which was checked to fit.
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
        """Find each tensor of the module in a file that is not in our own layout."""
        model = diffusion_model(stored)
        family = family_of(self.config)
        if family is not None:
            check_kind(self.weights, family, model)
        rules = () if family is None else family.rules_for(self.config)
        return map_keys(model, module.state_dict().keys(), rules)


def check_kind(path: Path, family: Family, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError, which names its kind, if our module does not support a checkpoint."""
    relative = family.relative({key: tensor.shape for key, tensor in stored.items()})
    if relative is not None:
        raise CheckpointError(
            f"{str(path)!r} is {relative}; of the family {family.name!r}, only plain "
            f"{family.makes} models are supported: use a checkpoint of one"
        )


def empty_module(config: Buildable, dtype: torch.dtype | None = None) -> Any:
    """Build a config's module on the meta device, for `fill`.

    `dtype` casts it as `module.to` does, so layers that stay in fp32 do so.

    Raises InputError for a module with buffers that checkpoints do not contain.
    """
    with torch.device("meta"):
        module = config.build()
    lost = [name for name, _ in module.named_buffers() if name not in module.state_dict()]
    if lost:
        raise InputError(
            f"{type(module).__name__} has buffers that checkpoints do not contain "
            f"({', '.join(lost)}); register them with persistent=True, or compute them where they "
            "are used"
        )
    return module if dtype is None else module.to(dtype)


def shapes_of(config: Buildable) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's state, without allocating it."""
    return _shapes(empty_module(config))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def configured(registry: Registry[C], part: ComponentInfo, origin: Path) -> C:
    """Return the config of a part as a folder describes it.

    Raises CheckpointError if the part is not registered, or its config is invalid.
    """
    if part.architecture not in registry.names():
        raise CheckpointError(
            f"{str(origin)!r} describes the {registry.kind} {part.architecture!r}, which is not "
            "registered here: import the module that registers it (diffusion-apt --import MODULE), "
            "or use a newer version of this package if it is from one; otherwise "
            f"{suggest(part.architecture, registry.names())}"
        )
    try:
        return registry.configured(part.architecture, part.config)
    except InputError as error:
        raise unbuildable(origin, error) from error


def unbuildable(origin: Path, error: InputError) -> CheckpointError:
    """Return the error for a description with an invalid config."""
    return CheckpointError(
        f"{str(origin)!r} describes a model that cannot be built: {error}; it may need a newer "
        "version of this package"
    )


@dataclass(frozen=True)
class StoredPieces:
    """The places of a module's weights.

    Attributes:
        pieces: stored tensors, by name in the module as it was built.
        source: name for messages.
    """

    pieces: Mapping[str, Piece]
    source: str

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredPieces:
        return self


def begin_at(module: Any, origin: StoredPieces) -> None:
    """Set the `origin` of a newly built module on the meta device, which still has all weights."""
    module.origin = origin
    for layer in module.modules():
        # Rows that were dropped when the layer was built are not in the files either.
        if hasattr(layer, "stored_rows"):
            del layer.stored_rows


def load_weights(
    path: str | Path, module: nn.Module, *, device: torch.device | str = "cpu"
) -> None:
    """Copy a safetensors file, or the shards of an index, into a module; see `fill`.

    Args:
        path: the file or the index.
        module: the module, whose state has the names in the file.
        device: device for tensors that are on the meta device.

    Raises:
        CheckpointError: if a file is missing, truncated or not safetensors, its keys and shapes
            are not exactly the module's (which then does not change), or a value is not finite.
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
    """Copy stored tensors into a module, one at a time, cast to its dtypes.

    Parameters and buffers on the meta device are allocated on `device`; others stay where they are.
    Memory holds at most the module and one tensor.

    Raises:
        CheckpointError: if the keys and shapes are not exactly the module's (which then does not
            change), or a value is not finite.
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
                f"{str(stored.file)!r}: {stored.key!r} is {stored.dtype} and has no scale, so its "
                "quantisation is unknown; use the bf16 or fp16 file of the same model"
            )


def copy_piece(piece: Piece, target: Tensor, rows: slice | None = None) -> None:
    """Copy a stored tensor into one of a module, cast to its dtype.

    Args:
        target: a tensor on any device, or this rank's part of a sharded one.
        rows: the rows of the whole tensor that this part has; None for all.

    Raises CheckpointError for values that are not finite.
    """
    target, file, key = target.detach(), str(piece.stored.file), piece.stored.key
    with piece.stored.mapped() as whole:
        value = piece.take(whole)
        value = value if rows is None else value[rows]
        check_finite(file, key, value)
        target.copy_(value)
        if target.dtype == torch.float16 and value.dtype != torch.float16:
            # fp16 is the only target dtype whose range may be narrower than the file's.
            check_finite(file, key, target)


def put_empty(owner: nn.Module, name: str, device: torch.device | str) -> Tensor:
    """Replace a module's tensor on the meta device by an empty one on `device`, and return it."""
    old = getattr(owner, name)
    new = torch.empty_like(old, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(owner, name, new)
    return new


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a module's state as safetensors; `dtype` None keeps each tensor's own.

    Raises:
        CheckpointError: for values that are not finite, before or after casting, or a failure to
            write. An existing file then does not change.
    """
    save_tensors(path, module.state_dict(), dtype)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    like: Mapping[str, Tensor] | None = None,
) -> None:
    """Write tensors to one safetensors file, one after the other; see `save_weights`.

    `like` has the names, shapes and dtypes of `tensors`, on any device. Pass it if tensors are
    costly to access; each is then accessed once.
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
    """Return a tensor as files store it: floating point in `dtype`, unless that is None."""
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def check_finite(path: str, key: str, value: Tensor) -> None:
    """Raise CheckpointError, which names the tensor, if a value is NaN or infinite."""
    if not value.is_floating_point() or not value.numel():
        return
    if value.element_size() == 1:
        # Few ops support 8-bit dtypes.
        value = value.float()
    # aminmax propagates NaN and needs no temporary memory: temporary copies would fragment the
    # heap between the small tensors that follow.
    low, high = torch.aminmax(value)
    if not math.isfinite(low) or not math.isfinite(high):
        bad = int((~torch.isfinite(value)).sum())
        raise CheckpointError(
            f"{path!r}: {bad} of {value.numel()} values of {key!r} are NaN or infinite in "
            f"{str(value.dtype).removeprefix('torch.')}; the training run diverged, or the range "
            "of the dtype is too small: use an earlier checkpoint or a wider dtype"
        )


def _check_keys(source: str, stored: Shapes, expected: Shapes, marks: Marks) -> None:
    """Raise CheckpointError unless `stored` has exactly the keys and shapes of `expected`.

    Args:
        source: name of the checkpoint, for the message.
        stored, expected: shapes by key.
        marks: marks of the families that the checkpoint may belong to.
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
