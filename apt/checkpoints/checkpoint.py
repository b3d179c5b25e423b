"""The checkpoint of a backbone: where its weights are, of what, and a module filled from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from apt.checkpoints.info import ComponentInfo
from apt.checkpoints.layouts import Family, diffusion_model, family_marks, family_of, map_keys
from apt.checkpoints.origin import StoredPieces, begin_at
from apt.checkpoints.reading import StoredTensor, read_stored
from apt.checkpoints.weights import Marks, Piece, check_fit, fill
from apt.errors import CheckpointError, InputError
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
    """The module of a config on the meta device, for `apt.checkpoints.weights.fill`.

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
