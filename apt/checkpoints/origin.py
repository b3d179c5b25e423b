"""Modules that get their weights late: built without memory, changed and sharded, and then filled.

A backbone on the meta device knows where its weights are. What training does to it, it can do
without them: copy it, cut layers off, put adapters beside others, shard it. Then each rank reads
from the files what it keeps, one tensor at a time, and nothing else is ever in its memory.
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
"""What peft puts into the name of a layer that it puts an adapter beside."""

Frozen = MutableMapping[tuple[Any, ...], nn.Parameter]
"""Weights that do not train, by where they come from: networks on one device can share them."""


class _Awaited(NamedTuple):
    """A tensor of a network that has no memory yet, and what it will hold."""

    owner: nn.Module
    name: str
    piece: Piece


def fill_from_origins(
    network: nn.Module, device: torch.device, frozen: Frozen | None = None
) -> None:
    """Give a network's tensors on the meta device memory and their stored values.

    Of a tensor that is sharded, only this rank's rows are read.

    Args:
        network: contains modules with an `origin`; what is not on the meta device stays as it is.
        device: where to.
        frozen: weights that networks share, if they may: those that do not train are taken from it
            or put into it.

    Raises:
        CheckpointError: a file that is damaged or gone, or values that are not finite.
    """
    awaited = list(_awaited(network))
    # All at once, as FSDP has to learn of the new tensors.
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
    """What a tensor of a network was in the files that it began with; None for one that is new."""
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
