"""Deferred loading: modules are built without memory, modified and sharded, and then filled.

A backbone on the meta device knows where its weights are. Training can prepare it without them:
copy it, drop layers, add adapters, shard it. Then each rank reads only its own part from the files,
one tensor at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt.checkpoints.reading import Piece
from apt.checkpoints.weights import StoredPieces, copy_piece, put_empty
from apt.distributed.tensors import local, own_rows

BASE_LAYER = ".base_layer."
"""What peft inserts into the name of a layer that gets an adapter."""

Frozen = MutableMapping[tuple[Any, ...], nn.Parameter]
"""Frozen weights by origin, which networks on one device can share."""


class _Awaited(NamedTuple):
    """A tensor of a network that has no memory yet, and its stored value."""

    owner: nn.Module
    name: str
    piece: Piece


def fill_from_origins(
    network: nn.Module, device: torch.device, frozen: Frozen | None = None
) -> None:
    """Allocate a network's tensors on the meta device, and load their stored values.

    For a sharded tensor, only this rank's rows are read.

    Args:
        network: contains modules with an `origin`; tensors on other devices do not change.
        device: device of the new tensors.
        frozen: if given, weights that networks share: frozen weights are taken from it, or added.

    Raises:
        CheckpointError: for a file that is damaged or missing, or values that are not finite.
    """
    awaited = list(_awaited(network))
    # All at once through `_apply`, so that FSDP notices the new tensors.
    frozen = None if any(_is_sharded(getattr(a.owner, a.name)) for a in awaited) else frozen
    if frozen is None:
        network._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    with torch.no_grad():
        for owner, name, piece in awaited:
            target = getattr(owner, name)
            key = (piece, target.dtype, device)
            shares = frozen is not None and not target.requires_grad
            if frozen is not None and shares and key in frozen:
                setattr(owner, name, frozen[key])
                continue
            if target.is_meta:
                target = put_empty(owner, name, device)
            copy_piece(piece, local(target), own_rows(target))
            if frozen is not None and shares:
                frozen[key] = target


def stored_piece(network: nn.Module, name: str) -> Piece | None:
    """Return where the initial value of a network's tensor is stored; None for a new tensor."""
    for prefix, module in _with_origins(network):
        if name.startswith(prefix):
            owner = network.get_submodule(name.rpartition(".")[0])
            return _piece(module.origin, owner, name.removeprefix(prefix))
    return None


def _with_origins(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        if getattr(module, "origin", None) is not None:
            yield f"{name}." if name else "", module


def _awaited(network: nn.Module) -> Iterator[_Awaited]:
    for _, module in _with_origins(network):
        for key, value in module.state_dict(keep_vars=True).items():
            if value.is_meta:
                owner_name, _, name = key.rpartition(".")
                owner = module.get_submodule(owner_name)
                piece = _piece(module.origin, owner, key)
                assert piece is not None, f"{key} comes from nowhere"
                yield _Awaited(owner, name, piece)


def _piece(origin: StoredPieces, owner: nn.Module, key: str) -> Piece | None:
    piece = origin.pieces.get(f".{key}".replace(BASE_LAYER, ".").removeprefix("."))
    rows = getattr(owner, "stored_rows", ())
    return piece if piece is None or not rows else dataclasses.replace(piece, rows=rows)


def _is_sharded(tensor: Tensor) -> bool:
    return own_rows(tensor) is not None
